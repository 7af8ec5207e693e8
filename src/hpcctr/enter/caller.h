/*
 * Who runs enter, and what enter may do: ids, user namespace, capabilities, and a /proc that is the kernel's.
 */
#ifndef HPCCTR_ENTER_CALLER_H
#define HPCCTR_ENTER_CALLER_H

#include "report.h"

#define ADMIN (1U << CAP_SYS_ADMIN)
#define CHROOT (1U << CAP_SYS_CHROOT)
_Static_assert(CAP_SYS_ADMIN < 32 && CAP_SYS_CHROOT < 32, "both lie in the first word of a capability set");

/* The host's /proc, opened before going in: inside, a path called /proc proves nothing. */
static int proc_fd;

/* What the call leaves as it was must be what ends the launch: a filter may answer without carrying it out. */
static void read_capabilities(struct __user_cap_data_struct sets[2])
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    long error = sys2(__NR_capget, POINTER(&header), POINTER(sets));

    if (error < 0)
        die_of(FAILED, "enter-unusable", "capget", error, ASK_DOCTOR);
}

/* Inheritable is always emptied, and with it the ambient set, which the kernel keeps within it (capabilities(7)). */
static void set_capabilities(uint32_t permitted, uint32_t effective)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct sets[2] = {{.permitted = permitted, .effective = effective}};
    long error = sys2(__NR_capset, POINTER(&header), POINTER(sets));

    if (error < 0)
        die_of(FAILED, "enter-unusable", "capset", error, ASK_DOCTOR);
}

static void raise(uint32_t capabilities)
{
    set_capabilities(ADMIN | CHROOT, capabilities);
}

static void lower(void)
{
    set_capabilities(ADMIN | CHROOT, 0);
}

static bool are_equal_ids(long call)
{
    uint32_t real = 0;
    uint32_t effective = 1;
    uint32_t saved = 2;
    long error = sys3(call, POINTER(&real), POINTER(&effective), POINTER(&saved));

    return error == 0 && real == effective && real == saved;
}

static void require_equal_ids(void)
{
    static const char hint[] = "start hpcctr without setuid or setgid programs around it";

    if (!are_equal_ids(__NR_getresuid))
        die(REFUSED, "caller-refused", "user ids", "real, effective and saved user id differ", hint);
    if (!are_equal_ids(__NR_getresgid))
        die(REFUSED, "caller-refused", "group ids", "real, effective and saved group id differ", hint);
}

static void require_filesystem(int fd, const char *path, long magic)
{
    struct statfs filesystem = {0};
    long error = sys2(__NR_fstatfs, fd, POINTER(&filesystem));

    if (error < 0)
        die_of(FAILED, "view", path, error, ASK_DOCTOR);
    if (filesystem.f_type != magic)
        die(FAILED, "view", path, "not the kernel's own filesystem", ASK_DOCTOR);
}

static void open_proc(void)
{
    long fd = sys4(__NR_openat, AT_FDCWD, POINTER("/proc"), O_PATH | O_DIRECTORY | O_CLOEXEC, 0);

    if (fd < 0)
        die_of(FAILED, "view", "/proc", fd, ASK_DOCTOR);
    proc_fd = (int)fd;
    require_filesystem(proc_fd, "/proc", PROC_SUPER_MAGIC);
}

/* In a user namespace the kernel gives file capabilities that hold there only, and uid 0 may be the caller. */
static void require_initial_user_namespace(void)
{
    struct statx status = {0};
    long error = sys5(__NR_statx, proc_fd, POINTER("self/ns/user"), 0, STATX_INO, POINTER(&status));

    /* A kernel without user namespaces has one less there; a /proc of processes this one is not among has no self. */
    if (error == -ENOENT && sys5(__NR_statx, proc_fd, POINTER("self/ns/mnt"), 0, STATX_INO, POINTER(&status)) == 0)
        return;
    if (error < 0)
        die_of(FAILED, "view", "/proc/self/ns/user", error, ASK_DOCTOR);
    if (status.stx_ino != INITIAL_USER_NAMESPACE)
        die(REFUSED, "caller-refused", "user namespace", "the calling process is in a user namespace of its own",
            "start hpcctr outside of unshare, rootless podman and the like");
}

static bool is_traced(void)
{
    static char status[4096];
    long count;
    long fd = sys4(__NR_openat, proc_fd, POINTER("self/status"), O_RDONLY | O_CLOEXEC, 0);

    if (fd < 0)
        return false;
    count = sys3(__NR_read, fd, POINTER(status), sizeof(status) - 1);
    for (long at = 0; at < count; at++)
        if (starts_with(status + at, "\nTracerPid:\t"))
            return status[at + (long)sizeof("\nTracerPid:\t") - 1] != '0';
    return false;
}

/* The reasons are those of cap_bprm_creds_from_file in the kernel's security/commoncap.c. */
_Noreturn static void die_without_capabilities(void)
{
    static const char what[] = "hpcctr-enter has not the capabilities SYS_ADMIN and SYS_CHROOT";
    struct statfs filesystem;

    if (sys5(__NR_prctl, PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1)
        die(REFUSED, "no-new-privs", what, "no_new_privs is set on the calling process",
            "start hpcctr where it is not set: grep NoNewPrivs /proc/self/status");
    if (is_traced())
        die(REFUSED, "traced", what, "a debugger or strace traces the calling process",
            "trace inside: hpcctr run IMAGE -- strace COMMAND");
    if (sys5(__NR_prctl, PR_CAPBSET_READ, CAP_SYS_ADMIN, 0, 0, 0) != 1 ||
        sys5(__NR_prctl, PR_CAPBSET_READ, CAP_SYS_CHROOT, 0, 0, 0) != 1)
        die(REFUSED, "caller-refused", what, "the bounding set of the calling process excludes them",
            "start hpcctr where it does not: grep CapBnd /proc/self/status");
    if (sys4(__NR_getxattr, POINTER("/proc/self/exe"), POINTER("security.capability"), 0, 0) <= 0)
        die(FAILED, "enter-unusable", what, "its file has none", ASK_DOCTOR);
    if (sys2(__NR_statfs, POINTER("/proc/self/exe"), POINTER(&filesystem)) < 0 ||
        (filesystem.f_flags & ST_NOSUID) != 0)
        die(FAILED, "enter-unusable", what, "its file lies on a filesystem mounted nosuid", ASK_DOCTOR);
    die(REFUSED, "caller-refused", what,
        "another process shares the current directory of the calling process (CLONE_FS), or a security module objects",
        "start hpcctr from an ordinary process of its own");
}

static void keep_two_capabilities(void)
{
    struct __user_cap_data_struct sets[2] = {{0}};

    read_capabilities(sets);
    if ((sets[0].permitted & (ADMIN | CHROOT)) != (ADMIN | CHROOT))
        die_without_capabilities();
    lower();
    /* With fs.suid_dumpable=1 a program with file capabilities is open to inspection. execve sets this back. */
    if (sys5(__NR_prctl, PR_SET_DUMPABLE, 0, 0, 0, 0) < 0 || sys5(__NR_prctl, PR_GET_DUMPABLE, 0, 0, 0, 0) != 0)
        die(FAILED, "enter-unusable", "PR_SET_DUMPABLE", "the kernel refuses it", ASK_DOCTOR);
}

/* Checked, not assumed: a seccomp filter can answer a call without carrying it out. */
static void give_up_privileges(void)
{
    struct __user_cap_data_struct sets[2] = {{~0U, ~0U, ~0U}, {~0U, ~0U, ~0U}};

    set_capabilities(0, 0);
    if (sys5(__NR_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ||
        sys5(__NR_prctl, PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) != 1)
        die(FAILED, "view", "no_new_privs", "not in force", ASK_DOCTOR);
    read_capabilities(sets);
    for (int word = 0; word < 2; word++)
        if ((sets[word].permitted | sets[word].effective | sets[word].inheritable) != 0)
            die(FAILED, "view", "capabilities", "still held", ASK_DOCTOR);
}

#endif
