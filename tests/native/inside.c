/*
 * The command of a launch that tells what it has: everything hpcctr promises of it, one line a fact, the same in every
 * launch of the same plan. Linked statically: it needs nothing of the image.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

static void tell_capabilities(void)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct sets[2];
    int ambient = 0;

    if (syscall(SYS_capget, &header, sets) != 0)
        exit(98);
    for (int word = 0; word < 2; word++)
        printf("capabilities %x %x %x\n", sets[word].inheritable, sets[word].permitted, sets[word].effective);
    for (int capability = 0; capability < 64; capability++)
        ambient += prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, capability, 0, 0) > 0;
    printf("ambient %d\n", ambient);
}

/* Lines of a status file that name a set or a promise. */
static void tell_status(const char *path)
{
    char line[512];
    FILE *file = fopen(path, "r");

    if (file == NULL) {
        printf("no status\n");
        return;
    }
    while (fgets(line, sizeof(line), file) != NULL)
        if (strncmp(line, "CapInh", 6) == 0 || strncmp(line, "CapPrm", 6) == 0 || strncmp(line, "CapEff", 6) == 0 ||
            strncmp(line, "CapAmb", 6) == 0 || strncmp(line, "NoNewPrivs", 10) == 0 || strncmp(line, "TracerPid", 9) == 0)
            printf("status %s", strncmp(line, "TracerPid", 9) == 0 ? "TracerPid\n" : line);
    fclose(file);
}

static void tell_threads(void)
{
    char path[300];
    DIR *tasks = opendir("/proc/self/task");
    const struct dirent *entry;

    while (tasks != NULL && (entry = readdir(tasks)) != NULL) {
        if (entry->d_name[0] == '.')
            continue;
        snprintf(path, sizeof(path), "/proc/self/task/%s/status", entry->d_name);
        tell_status(path);
    }
}

/* Point, options and kinds of tags of every mount; neither ids nor devices, which are new each time. */
static void tell_mounts(void)
{
    static char line[65536];
    char *word, *rest;
    FILE *file = fopen("/proc/self/mountinfo", "r");

    if (file == NULL) {
        printf("no mountinfo\n");
        return;
    }
    while (fgets(line, sizeof(line), file) != NULL) {
        printf("mount");
        rest = line;
        for (int field = 0; (word = strsep(&rest, " ")) != NULL && strcmp(word, "-") != 0; field++)
            if (field >= 4)
                printf(" %s", field >= 6 ? strsep(&word, ":") : word);
        printf("\n");
    }
    fclose(file);
}

int main(int argc, char **argv)
{
    char directory[4096];
    int signal_at_death = -1;
    struct statvfs root;

    setvbuf(stdout, NULL, _IOFBF, 1 << 16);
    for (int i = 0; i < argc; i++)
        printf("argument %s\n", argv[i]);
    for (int fd = 0; fd < 1024; fd++)
        if (fcntl(fd, F_GETFD) >= 0)
            printf("descriptor %d\n", fd);
    tell_capabilities();
    tell_status("/proc/self/status");
    tell_threads();
    prctl(PR_GET_PDEATHSIG, &signal_at_death);
    printf("no_new_privs %d\ndumpable %d\n", prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0), prctl(PR_GET_DUMPABLE));
    printf("pdeathsig %d\npersonality %x\n", signal_at_death, (unsigned int)personality(0xffffffff));
    printf("ids %u %u %u %u\n", getuid(), geteuid(), getgid(), getegid());
    printf("directory %s\n", getcwd(directory, sizeof(directory)) != NULL ? directory : "?");
    printf("root %lx\n", statvfs("/", &root) == 0 ? root.f_flag : 0);
    tell_mounts();
    return 0;
}
