/*
 * enter: the caller's own process walks into a mount namespace that the engine built, and becomes the command.
 *
 * The only code of hpcctr that holds capabilities in ordinary users' hands, and it trusts nobody: not its argv, not
 * the socket it is given, not the image. README.md beside this file is the threat model, enter_main below the story.
 *
 * Every failure ends the launch: status 125 (enter failed), 126 (refused or not executable), 127 (no candidate found).
 * Nothing is undone on the way out: what was made belongs to this process alone and ends with it.
 */
#include "mountinfo.h"
#include "plan.h"

#ifndef HPCCTR_ENGINE_SOCKET
#define HPCCTR_ENGINE_SOCKET "/run/hpcctr/engine.sock"
#endif
_Static_assert(sizeof(HPCCTR_ENGINE_SOCKET) <= UNIX_PATH_MAX, "the engine's socket path does not fit a sockaddr_un");

enum { AUTOBIND_LENGTH = 6, ANSWER_SECONDS = 60, MAX_ANSWER = 1 + 4096 };

#define ASK_ENGINE "systemctl status hpcctr-engine"

/* ---- the engine ---- */

static int socket_option(int option)
{
    int value = -1;
    uint32_t length = sizeof(value);
    long error = sys5(__NR_getsockopt, plan.socket, SOL_SOCKET, option, POINTER(&value), POINTER(&length));

    return error < 0 ? -1 : value;
}

static bool is_root_behind_socket(void)
{
    struct peer_credentials peer = {0, UINT32_MAX, UINT32_MAX};
    uint32_t length = sizeof(peer);
    long error = sys5(__NR_getsockopt, plan.socket, SOL_SOCKET, SO_PEERCRED, POINTER(&peer), POINTER(&length));

    return error == 0 && length == sizeof(peer) && peer.uid == 0;
}

/*
 * SO_PEERCRED tells who called listen(2), and any daemon started by root would pass; so the peer must also have the
 * engine's name, which only root can bind, in a directory only root can make. A half of a socketpair has no name and is
 * taken from root only, whose hpcctr is an engine itself. The kernel names it when the engine, which wants credentials,
 * sends on it: a zero byte and five digits (unix_autobind in net/unix/af_unix.c).
 */
static bool is_engine_behind_socket(void)
{
    struct sockaddr_un name = {0};
    uint32_t length = sizeof(name);
    long error = sys3(__NR_getpeername, plan.socket, POINTER(&name), POINTER(&length));

    if (error < 0 || name.sun_family != AF_UNIX)
        return false;
    if (length == offsetof(struct sockaddr_un, sun_path) ||
        (length == offsetof(struct sockaddr_un, sun_path) + AUTOBIND_LENGTH && name.sun_path[0] == '\0'))
        return sys1(__NR_getuid, 0) == 0;
    return length == offsetof(struct sockaddr_un, sun_path) + sizeof(HPCCTR_ENGINE_SOCKET) &&
           equal(name.sun_path, HPCCTR_ENGINE_SOCKET);
}

static void require_engine_socket(void)
{
    if (socket_option(SO_DOMAIN) != AF_UNIX || socket_option(SO_TYPE) != SOCK_SEQPACKET || !is_root_behind_socket() ||
        !is_engine_behind_socket())
        die(REFUSED, "caller-refused", "SOCK", "not a connection to the engine at " HPCCTR_ENGINE_SOCKET,
            "hpcctr run starts hpcctr-enter; nothing else has to");
    if (sys3(__NR_fcntl, plan.socket, F_SETFD, FD_CLOEXEC) < 0 || sys2(__NR_fcntl, plan.socket, F_GETFD) != FD_CLOEXEC)
        die(FAILED, "protocol", "SOCK", "cannot be closed on exec", ASK_DOCTOR);
}

static void await_answer(void)
{
    /* The call writes back what remains when a signal interrupts it: stopping and continuing does not extend it. */
    struct __kernel_timespec remaining = {ANSWER_SECONDS, 0};
    struct pollfd poll = {plan.socket, POLLIN, 0};
    long ready;

    do
        ready = sys5(__NR_ppoll, POINTER(&poll), 1, POINTER(&remaining), 0, 8);
    while (ready == -EINTR);
    if (ready == 0)
        die(FAILED, "deadline", "engine", "no answer within 60 seconds", ASK_ENGINE);
    if (ready < 0)
        die_of(FAILED, "protocol", "engine", ready, ASK_ENGINE);
}

/* -1 unless the control data is one SCM_RIGHTS with one descriptor and nothing else (cmsg(3)). */
static int only_descriptor(const unsigned char *control, size_t length)
{
    struct control_header header;
    int fd;

    if (length < sizeof(header) + sizeof(fd) || length > sizeof(header) + sizeof(long))
        return -1;
    memcpy(&header, control, sizeof(header));
    if (header.level != SOL_SOCKET || header.type != SCM_RIGHTS || header.length != sizeof(header) + sizeof(fd))
        return -1;
    memcpy(&fd, control + sizeof(header), sizeof(fd));
    return fd;
}

static int receive_namespace(void)
{
    static unsigned char answer[MAX_ANSWER];
    static _Alignas(8) unsigned char control[256];
    struct iovec part = {answer, sizeof(answer)};
    struct message message = {.parts = &part, .part_count = 1, .control = control, .control_length = sizeof(control)};
    bool was_reset = false;
    long count;
    int fd;

    /* An engine that refuses may have answered and hung up already: the answer can still be read. */
    count = sys6(__NR_sendto, plan.socket, POINTER("E"), 1, MSG_NOSIGNAL | MSG_DONTWAIT, 0, 0);
    if (count != 1 && count != -EPIPE && count != -ECONNRESET)
        die_of(FAILED, "protocol", "engine", count, ASK_ENGINE);
    await_answer();
    count = sys3(__NR_recvmsg, plan.socket, POINTER(&message), MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (count == -ECONNRESET) { /* reported once, before what is still queued */
        was_reset = true;
        count = sys3(__NR_recvmsg, plan.socket, POINTER(&message), MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    }
    if (count == 0 || (was_reset && count < 0))
        die(FAILED, "protocol", "engine", "it closed the connection without an answer", ASK_ENGINE);
    if (count < 0)
        die_of(FAILED, "protocol", "engine", count, ASK_ENGINE);
    if ((message.flags & (MSG_TRUNC | MSG_CTRUNC)) != 0)
        die(FAILED, "protocol", "engine", "the answer is too long, or the limit of open files too low",
            "ulimit -n 1024");
    if (answer[0] != 0 && message.control_length == 0) {
        write_out((const char *)answer + 1, (size_t)count - 1);
        leave(answer[0]);
    }
    fd = only_descriptor(control, message.control_length);
    if (answer[0] != 0 || count != 1 || fd < 0)
        die(FAILED, "protocol", "engine", "its answer is not one descriptor", ASK_DOCTOR);
    require_filesystem(fd, "namespace from the engine", NSFS_MAGIC);
    if (sys2(__NR_ioctl, fd, NS_GET_NSTYPE) != CLONE_NEWNS)
        die(FAILED, "protocol", "engine", "its answer is not a mount namespace", ASK_DOCTOR);
    return fd;
}

/* ---- the caller's directories ---- */

static void open_sources(void)
{
    struct mount *mount;
    long fd;

    for (mount = plan.mounts; mount < plan.mounts_end; mount++) {
        fd = sys4(__NR_openat, AT_FDCWD, POINTER(mount->source), O_PATH | O_CLOEXEC, 0);
        if (fd < 0)
            die_of(FAILED, "mount-source", mount->source, fd, "carry in something else, or see: ls -ld ");
        mount->source_fd = (int)fd;
        if (equal(mount->target, "/proc"))
            require_filesystem(mount->source_fd, "/proc", PROC_SUPER_MAGIC);
        if (equal(mount->target, "/sys"))
            require_filesystem(mount->source_fd, "/sys", SYSFS_MAGIC);
    }
}

static long set_attributes(int fd, uint64_t attributes, uint64_t propagation)
{
    struct mount_attr change = {.attr_set = attributes, .propagation = propagation};

    return sys5(__NR_mount_setattr, fd, POINTER(""), AT_EMPTY_PATH | AT_RECURSIVE, POINTER(&change), sizeof(change));
}

/* Slaves: what the host mounts later appears here (automounts), what is mounted here does not reach the host. */
static void clone_sources(void)
{
    const unsigned int flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH | AT_RECURSIVE;
    struct mount *mount;
    long error;
    long fd;

    for (mount = plan.mounts; mount < plan.mounts_end; mount++) {
        error = 0;
        raise(ADMIN);
        fd = sys3(__NR_open_tree, mount->source_fd, POINTER(""), flags);
        if (fd >= 0)
            error = set_attributes((int)fd, mount->attributes, MS_SLAVE);
        lower();
        if (fd < 0)
            die_of(FAILED, "mount-source", mount->source, fd, "findmnt -o TARGET,PROPAGATION -T ");
        if (error < 0)
            die_of(FAILED, "mount-source", mount->source, error, ASK_DOCTOR);
        mount->tree_fd = (int)fd;
    }
}

static const char *path_of(const struct mount *mount)
{
    static char path[PATH_MAX];
    static char link[] = "self/fd/..........";
    size_t at = sizeof("self/fd/") - 1;
    const char *digit;
    long length;

    for (digit = decimal((unsigned long)mount->source_fd); *digit != '\0'; digit++)
        link[at++] = *digit;
    link[at] = '\0';
    length = sys4(__NR_readlinkat, proc_fd, POINTER(link), POINTER(path), sizeof(path));
    if (length < 0)
        die_of(FAILED, "mount-source", mount->source, length, "use a shorter path");
    if (length >= (long)sizeof(path))
        die(FAILED, "mount-source", mount->source, "its full path is too long", "use a shorter path");
    path[length] = '\0';
    return path;
}

/* A recursive clone leaves unbindable mounts out and so shows what they cover (fs/namespace.c, copy_tree). */
static void refuse_unbindable(void)
{
    const struct mount *mount;

    if (!line.is_unbindable)
        return;
    for (mount = plan.mounts; mount < plan.mounts_end; mount++)
        if (is_at_or_beneath(line.point, path_of(mount)))
            die(FAILED, "mount-source", mount->source, "an unbindable mount beneath it hides something",
                "carry in directories beside it: findmnt -o TARGET,PROPAGATION");
}

/* Looks after cloning: what a clone left out was mounted before, and is still listed or hides nothing any more. */
static void take_sources(void)
{
    const struct mount *mount;

    open_sources();
    clone_sources();
    if (plan.mounts_end > plan.mounts)
        visit_mounts(refuse_unbindable);
    for (mount = plan.mounts; mount < plan.mounts_end; mount++)
        sys1(__NR_close, mount->source_fd);
}

/* ---- going in ---- */

static struct mount root;

static uint64_t mount_id(int fd, const char *path)
{
    struct statx status = {0};
    long error = sys5(__NR_statx, fd, POINTER(""), AT_EMPTY_PATH | AT_NO_AUTOMOUNT | AT_STATX_DONT_SYNC, STATX_MNT_ID,
                      POINTER(&status));

    if (error < 0 || (status.stx_mask & STATX_MNT_ID) == 0)
        die(FAILED, "view", path, "the kernel does not tell which mount this is", ASK_DOCTOR);
    return status.stx_mnt_id;
}

static uint64_t inode_of(int fd, const char *path)
{
    struct statx status = {0};
    long error = sys5(__NR_statx, fd, POINTER(path), AT_EMPTY_PATH, STATX_INO, POINTER(&status));

    if (error < 0)
        die_of(FAILED, "view", "mount namespace", error, ASK_DOCTOR);
    if ((status.stx_mask & STATX_INO) == 0)
        die(FAILED, "view", "mount namespace", "the kernel does not tell which one this is", ASK_DOCTOR);
    return status.stx_ino;
}

static void make_own_copy(uint64_t engines)
{
    long error;

    raise(ADMIN);
    error = sys1(__NR_unshare, CLONE_NEWNS);
    lower();
    if (error < 0)
        die_of(FAILED, "view", "unshare", error, "sysctl user.max_mnt_namespaces fs.mount-max");
    if (inode_of(proc_fd, "self/ns/mnt") == engines)
        die(FAILED, "view", "unshare", "the process has no namespace of its own", ASK_DOCTOR);
}

/* Private before anything is attached: below a shared mount it would appear in the whole peer group, the host too.
 * nosuid and nodev again: runc and crun lose them when they remount the root read-only. */
static void restrict_own_copy(void)
{
    long error;

    raise(ADMIN);
    error = set_attributes(root.tree_fd, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, MS_PRIVATE);
    lower();
    if (error < 0)
        die_of(FAILED, "view", "/", error, ASK_DOCTOR);
}

/* A plan without mounts is for the view of a running program, which is complete. Nothing is changed there, so no copy
 * is made: debuggers take a process in another namespace for one with other files. */
static void go_in(int namespace_fd)
{
    const uint64_t engines = inode_of(namespace_fd, "");
    const bool is_own = plan.mounts_end > plan.mounts;
    long error;
    long fd;

    raise(ADMIN | CHROOT);
    error = sys2(__NR_setns, namespace_fd, CLONE_NEWNS);
    lower();
    if (error < 0)
        die_of(FAILED, "view", "setns", error, ASK_DOCTOR);
    if (inode_of(proc_fd, "self/ns/mnt") != engines)
        die(FAILED, "view", "setns", "the process is not in the namespace of the engine", ASK_DOCTOR);
    if (is_own)
        make_own_copy(engines);
    fd = sys4(__NR_openat, AT_FDCWD, POINTER("/"), O_PATH | O_DIRECTORY | O_CLOEXEC, 0);
    if (fd < 0)
        die_of(FAILED, "view", "/", fd, ASK_DOCTOR);
    root.target = "/";
    root.attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_RDONLY;
    root.tree_fd = (int)fd;
    root.id = mount_id(root.tree_fd, "/");
    if (is_own)
        restrict_own_copy();
}

static int open_target(const char *target)
{
    struct open_how how = {
        .flags = O_PATH | O_CLOEXEC,
        .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS,
    };
    long fd = sys4(__NR_openat2, root.tree_fd, POINTER(target), POINTER(&how), sizeof(how));

    if (fd < 0)
        die_of(REFUSED, "mount-target", target, fd, "choose another path inside: -v SOURCE:TARGET");
    return (int)fd;
}

static void attach_sources(void)
{
    struct mount *mount;
    long error;
    int fd;

    for (mount = plan.mounts; mount < plan.mounts_end; mount++) {
        fd = open_target(mount->target);
        raise(ADMIN);
        error = sys5(__NR_move_mount, mount->tree_fd, POINTER(""), fd, POINTER(""),
                     MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
        lower();
        if (error == -ENOENT)
            die(FAILED, "mount-source", mount->source, "it vanished while the launch went on", "ls -ld ");
        if (error == -EPERM) /* the capability is there: security/landlock/fs.c, hook_move_mount */
            die(REFUSED, "caller-refused", mount->target,
                "a Landlock domain or a seccomp filter of the calling process forbids mounts",
                "start hpcctr outside of that sandbox");
        if (error < 0)
            die_of(REFUSED, "mount-target", mount->target, error, "a directory fits a directory, a file fits a file");
        sys1(__NR_close, fd);
        fd = open_target(mount->target);
        mount->id = mount_id(fd, mount->target);
        if (mount->id != mount_id(mount->tree_fd, mount->target))
            die(FAILED, "view", mount->target, "something else is mounted there", ASK_DOCTOR);
        sys1(__NR_close, fd);
    }
}

static void see_mount(struct mount *mount)
{
    if (mount->id != line.id)
        return;
    if ((line.attributes & mount->attributes) != mount->attributes)
        die(FAILED, "view", mount->target, "nosuid, nodev or read-only is not in force", ASK_DOCTOR);
    mount->was_seen = true;
}

static void see_line(void)
{
    struct mount *mount;

    if (line.is_shared)
        die(FAILED, "view", line.point, "what is mounted there would be mounted on the host too", ASK_DOCTOR);
    see_mount(&root);
    for (mount = plan.mounts; mount < plan.mounts_end; mount++)
        see_mount(mount);
}

static void require_applied(const struct mount *mount)
{
    if (!mount->was_seen)
        die(FAILED, "view", mount->target, "not among the mounts of this process", ASK_DOCTOR);
}

/* From mountinfo, not statfs(2), which asks file servers. */
static void read_back_view(void)
{
    const struct mount *mount;

    visit_mounts(see_line);
    require_applied(&root);
    for (mount = plan.mounts; mount < plan.mounts_end; mount++)
        require_applied(mount);
}

/* ---- becoming the command ---- */

/* A program that gains capabilities loses the caller's pdeathsig and parts of its personality (fs/exec.c). The signal
 * is put back first of all: until then the death of the parent goes unnoticed. */
static void restore_parent_death_signal(void)
{
    int signal = -1;

    if (sys5(__NR_prctl, PR_SET_PDEATHSIG, plan.pdeathsig, 0, 0, 0) < 0 ||
        sys5(__NR_prctl, PR_GET_PDEATHSIG, POINTER(&signal), 0, 0, 0) < 0 || signal != plan.pdeathsig)
        die_plan("PDEATHSIG", "the kernel refuses it");
}

static void restore_personality(void)
{
    sys1(__NR_personality, plan.personality);
    if ((unsigned int)sys1(__NR_personality, UINT32_MAX) != plan.personality)
        die(FAILED, "view", "PERSONALITY", "the kernel refuses it", "setarch --list");
}

_Noreturn static void become_command(char **envp)
{
    static const char hint[] = "ls -l it inside the image; a script begins with #! and its interpreter";
    bool may_not = false;
    long error;

    for (unsigned long i = 0; i < plan.candidate_count; i++) {
        error = sys3(__NR_execve, POINTER(plan.candidates[i]), POINTER(plan.argv), POINTER(envp));
        if (error != -ENOENT && error != -ENOTDIR && error != -EACCES)
            die_of(REFUSED, "not-executable", plan.candidates[i], error, hint);
        may_not = may_not || error == -EACCES;
    }
    if (may_not)
        die(REFUSED, "not-executable", plan.argv[0], "permission denied", hint);
    for (unsigned long i = 0; i < plan.candidate_count; i++)
        if (sys3(__NR_faccessat, AT_FDCWD, POINTER(plan.candidates[i]), F_OK) == 0)
            die(REFUSED, "not-executable", plan.candidates[i], "the interpreter or loader it names is missing", hint);
    die(NOT_FOUND, "command-not-found", plan.argv[0], "not found in the image",
        "name its full path inside the image, or set PATH with -e");
}

_Noreturn void enter_main(uintptr_t *stack);

/* At the start the stack holds argc, argv, NULL, envp, NULL, auxiliary vector. */
__attribute__((used, no_stack_protector)) _Noreturn void enter_main(uintptr_t *stack)
{
    long argc = (long)stack[0];
    char **argv = (char **)(stack + 1);
    char **envp = argv + argc + 1;
    uintptr_t *auxiliary = (uintptr_t *)envp;
    long error;

    place_stack_guard();
    while (*auxiliary != 0)
        auxiliary++;
    for (auxiliary++; auxiliary[0] != AT_NULL; auxiliary += 2)
        if (auxiliary[0] == AT_RANDOM)
            memcpy(&__stack_chk_guard, (const void *)auxiliary[1], sizeof(__stack_chk_guard));
    __stack_chk_guard &= ~(uintptr_t)0xff; /* a string cannot carry its zero byte */

    may_write_errors = sys2(__NR_fcntl, 2, F_GETFD) >= 0;
    require_equal_ids();
    open_proc();
    require_initial_user_namespace();
    keep_two_capabilities();

    parse_plan(argc, argv);
    restore_parent_death_signal();
    require_engine_socket();
    take_sources();

    go_in(receive_namespace());
    attach_sources();
    read_back_view();

    give_up_privileges();
    restore_personality();
    error = sys1(__NR_chdir, POINTER(plan.cwd));
    if (error < 0)
        die_of(FAILED, "cwd", plan.cwd, error, "carry it in with -v, or choose another with -w");
    become_command(envp);
}
