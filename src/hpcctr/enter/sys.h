/*
 * The ground enter stands on: its start, raw system calls, comparing text, and what no uapi header declares.
 *
 * No libc: a libc's start-up reads GLIBC_TUNABLES, scrubs LD_* and TMPDIR from a privileged program's environment and
 * opens /dev/null over a closed descriptor 0, 1 or 2, and the command must get all of these as the caller had them.
 * A system call returns the kernel's own answer: a negative errno on failure, never -1 with a global.
 */
#ifndef HPCCTR_ENTER_SYS_H
#define HPCCTR_ENTER_SYS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <asm/errno.h>
#include <asm/poll.h>
#include <asm/signal.h>
#include <asm/socket.h>
#include <asm/statfs.h>
#include <asm/unistd.h>
#include <linux/auxvec.h>
#include <linux/capability.h>
#include <linux/fcntl.h>
#include <linux/limits.h>
#include <linux/magic.h>
#include <linux/mount.h>
#include <linux/nsfs.h>
#include <linux/openat2.h>
#include <linux/prctl.h>
#include <linux/sched.h>
#include <linux/socket.h>
#include <linux/stat.h>
#include <linux/time_types.h>
#include <linux/un.h>

_Static_assert(sizeof(long) == 8 && sizeof(void *) == 8, "enter is written for 64-bit kernels");

/* include/linux/socket.h and include/linux/net.h of the kernel; not exported. */
#define AF_UNIX 1
#define SOCK_SEQPACKET 5
#define MSG_CTRUNC 0x8
#define MSG_TRUNC 0x20
#define MSG_DONTWAIT 0x40
#define MSG_NOSIGNAL 0x4000
#define MSG_CMSG_CLOEXEC 0x40000000
#define SCM_RIGHTS 1

struct iovec {
    void *base;
    size_t length;
};

struct message {
    void *name;
    int name_length;
    struct iovec *parts;
    size_t part_count;
    void *control;
    size_t control_length;
    unsigned int flags;
};

struct control_header {
    size_t length;
    int level;
    int type;
};

struct peer_credentials {
    uint32_t pid;
    uint32_t uid;
    uint32_t gid;
};

/* Bits of statfs(2) f_flags; equal to MOUNT_ATTR_RDONLY, _NOSUID and _NODEV (fs/statfs.c, flags_by_mnt). */
#define ST_RDONLY 0x1
#define ST_NOSUID 0x2
#define ST_NODEV 0x4
_Static_assert(ST_RDONLY == MOUNT_ATTR_RDONLY && ST_NOSUID == MOUNT_ATTR_NOSUID && ST_NODEV == MOUNT_ATTR_NODEV,
               "what mount_setattr sets is read back with statfs as it is");

/* Initial user namespace (include/linux/proc_ns.h, PROC_USER_INIT_INO): fixed since Linux 3.8. */
#define INITIAL_USER_NAMESPACE 0xEFFFFFFDU

#define F_OK 0

#if defined(__x86_64__)
static inline long sys6(long number, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    long result;

    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}
/* argc lies at the stack pointer (System V ABI, AMD64 supplement, 3.4.1). Aligned anew: the compiler relies on it. */
__asm__(".pushsection .text\n"
        ".globl _start\n.hidden _start\n.type _start, @function\n"
        "_start:\n\tendbr64\n\txorl %ebp, %ebp\n\tmovq %rsp, %rdi\n\tandq $-16, %rsp\n\tcall enter_main\n\thlt\n"
        ".size _start, .-_start\n.popsection\n");
#elif defined(__aarch64__)
static inline long sys6(long number, long a, long b, long c, long d, long e, long f)
{
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;
    register long x5 __asm__("x5") = f;

    __asm__ volatile("svc #0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
    return x0;
}
__asm__(".pushsection .text\n"
        ".globl _start\n.hidden _start\n.type _start, @function\n"
        "_start:\n\thint #34\n\tmov x29, #0\n\tmov x30, #0\n\tmov x0, sp\n\tand sp, x0, #-16\n"
        "\tbl enter_main\n\tbrk #1\n"
        ".size _start, .-_start\n.popsection\n");
#else
#error "enter knows x86-64 and aarch64"
#endif

#define sys5(n, a, b, c, d, e) sys6((n), (a), (b), (c), (d), (e), 0)
#define sys4(n, a, b, c, d) sys6((n), (a), (b), (c), (d), 0, 0)
#define sys3(n, a, b, c) sys6((n), (a), (b), (c), 0, 0, 0)
#define sys2(n, a, b) sys6((n), (a), (b), 0, 0, 0, 0)
#define sys1(n, a) sys6((n), (a), 0, 0, 0, 0, 0)
#define POINTER(p) ((long)(uintptr_t)(p))

/* The compiler calls these for structure copies and zeroing, even when freestanding. */
void *memset(void *destination, int byte, size_t count);
void *memcpy(void *restrict destination, const void *restrict source, size_t count);

void *memset(void *destination, int byte, size_t count)
{
    unsigned char *to = destination;

    while (count-- > 0)
        *to++ = (unsigned char)byte;
    return destination;
}

void *memcpy(void *restrict destination, const void *restrict source, size_t count)
{
    unsigned char *to = destination;
    const unsigned char *from = source;

    while (count-- > 0)
        *to++ = *from++;
    return destination;
}

static size_t length_of(const char *text)
{
    size_t length = 0;

    while (text[length] != '\0')
        length++;
    return length;
}

static bool starts_with(const char *text, const char *start)
{
    for (; *start != '\0'; text++, start++)
        if (*text != *start)
            return false;
    return true;
}

static bool equal(const char *one, const char *other)
{
    return starts_with(one, other) && length_of(one) == length_of(other);
}

/* Compares components, not characters: /scratch2 is not beneath /scratch. */
static bool is_at_or_beneath(const char *path, const char *top)
{
    const char *rest;

    if (equal(top, "/"))
        return path[0] == '/';
    if (!starts_with(path, top))
        return false;
    rest = path + length_of(top);
    return *rest == '\0' || *rest == '/';
}

_Noreturn static void leave(int status)
{
    for (;;)
        sys1(__NR_exit_group, status);
}

/* The stack protector's secret and its verdict: what a libc would bring. build.py tells the compiler where it is: at
 * this name on x86-64, where the thread pointer points on aarch64 (whose compiler would have the name relocated). */
uintptr_t __stack_chk_guard;

static inline void place_stack_guard(void)
{
#if defined(__aarch64__)
    __asm__ volatile("msr tpidr_el0, %0" : : "r"(&__stack_chk_guard));
#endif
}

_Noreturn void __stack_chk_fail(void);

_Noreturn void __stack_chk_fail(void)
{
    leave(125);
}

#endif
