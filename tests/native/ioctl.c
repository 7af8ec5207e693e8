/* Asks a real driver through its device node: one ioctl of its own, which every other driver answers with ENOTTY.
 *
 *     ioctl kvm PATH     prints the version of KVM's interface (KVM_GET_API_VERSION, linux/kvm.h)
 *     ioctl fuse PATH    asks to clone a connection that is none (FUSE_DEV_IOC_CLONE, linux/fuse.h): EPERM is FUSE's
 *                        answer, EINVAL before Linux 6.16
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>

int main(int argc, char **argv)
{
    int fd = argc == 3 ? open(argv[2], O_RDWR | O_CLOEXEC) : -1;
    uint32_t same = (uint32_t)fd;

    if (fd < 0) {
        printf("open: %s\n", strerror(errno));
        return 1;
    }
    if (strcmp(argv[1], "kvm") == 0)
        printf("kvm: version %d\n", ioctl(fd, KVM_GET_API_VERSION, 0));
    else
        printf("fuse: %s\n", ioctl(fd, FUSE_DEV_IOC_CLONE, &same) == 0 ? "cloned" : strerror(errno));
    return 0;
}
