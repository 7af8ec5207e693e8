/*
 * Launches the program enter again and again under ptrace, each time with another system call that fails or only claims
 * success, and reports how the launch ended. Plays the engine: a descriptor, or an exit status and a text.
 *
 *   inject LISTENER CONTAINER STATUS UID SOCKET PROGRAM ARGV...
 *
 * LISTENER listens at the path SOCKET; CONTAINER is the mount namespace to answer with, STATUS what to answer instead
 * when it is not 0. Root only: a tracer without CAP_SYS_PTRACE takes the capabilities of enter's file away.
 *
 * Reads lines `CALL VALUE` from standard input: the CALL-th call of enter (from 1) is not carried out and returns VALUE.
 * CALL 0 changes nothing and tells every call; CALL -N: so does every call of the number N-1. Answers each with a line
 *
 *   END OWN CALLS OUTSIDE OUT ERR     END: exit status, -signal, or 1000 for a launch that did not end in time
 *
 * OWN: `none` when no command was executed, else in which mount namespace: `own`, `container` or `host`; the others are
 * lengths of what follows: a line `NUMBER ARGUMENT EFFECTIVE-BEFORE EFFECTIVE-AFTER` per call, lines of
 * /proc/PID/status as they are when the command has been executed, standard output, standard error.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

enum { DESCRIPTOR = 109, SECONDS = 20, HUNG = 1000 };

struct text {
    char bytes[1 << 20];
    size_t length;
};

static struct text calls, outside;
static int listener, container, answer_status, out_fd, err_fd;
static uid_t account;
static const char *engine_path, *program;
static char **plan;

static void require(bool holds, const char *what)
{
    if (holds)
        return;
    perror(what);
    exit(99);
}

static void note_time_is_up(int number)
{
    (void)number;
}

static void add(struct text *text, const char *line)
{
    size_t length = strlen(line);

    require(text->length + length <= sizeof(text->bytes), "room");
    memcpy(text->bytes + text->length, line, length);
    text->length += length;
}

/* What /proc/PID/status says, without a buffer of stdio's. */
static const char *status_of(pid_t pid)
{
    static char status[8192];
    char path[64];
    ssize_t length;
    int fd;

    snprintf(path, sizeof(path), "/proc/%d/status", pid);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    require(fd >= 0, path);
    length = read(fd, status, sizeof(status) - 1);
    require(length > 0, path);
    close(fd);
    status[length] = '\0';
    return status;
}

static unsigned long effective(pid_t pid)
{
    const char *found = strstr(status_of(pid), "\nCapEff:\t");

    require(found != NULL, "CapEff");
    return strtoul(found + sizeof("\nCapEff:\t") - 1, NULL, 16);
}

static ino_t namespace_of(const char *pid)
{
    char path[64];
    struct stat status;

    snprintf(path, sizeof(path), "/proc/%s/ns/mnt", pid);
    require(stat(path, &status) == 0, path);
    return status.st_ino;
}

static const char *look_from_outside(pid_t pid)
{
    static const char *const names[] = {"CapInh", "CapPrm", "CapEff", "CapAmb", "NoNewPrivs", "Uid", "Gid", "Threads"};
    const char *status = status_of(pid);
    char number[16], line[256], key[32];
    const char *found;
    struct stat given;
    ino_t own;

    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        snprintf(key, sizeof(key), "\n%s:", names[i]);
        found = strstr(status, key);
        require(found != NULL, key);
        snprintf(line, sizeof(line), "%.*s\n", (int)strcspn(found + 1, "\n"), found + 1);
        add(&outside, line);
    }
    snprintf(number, sizeof(number), "%d", pid);
    own = namespace_of(number);
    require(fstat(container, &given) == 0, "container");
    return own == given.st_ino ? "container" : own == namespace_of("self") ? "host" : "own";
}

static void suppress(pid_t pid)
{
#if defined(__x86_64__)
    require(ptrace(PTRACE_POKEUSER, pid, offsetof(struct user_regs_struct, orig_rax), -1L) == 0, "orig_rax");
#else
    int number = -1;
    struct iovec part = {&number, sizeof(number)};

    require(ptrace(PTRACE_SETREGSET, pid, NT_ARM_SYSTEM_CALL, &part) == 0, "NT_ARM_SYSTEM_CALL");
#endif
}

static void give_result(pid_t pid, long value)
{
#if defined(__x86_64__)
    require(ptrace(PTRACE_POKEUSER, pid, offsetof(struct user_regs_struct, rax), value) == 0, "rax");
#else
    struct user_regs_struct registers;
    struct iovec part = {&registers, sizeof(registers)};

    require(ptrace(PTRACE_GETREGSET, pid, NT_PRSTATUS, &part) == 0, "NT_PRSTATUS");
    registers.regs[0] = (unsigned long)value;
    require(ptrace(PTRACE_SETREGSET, pid, NT_PRSTATUS, &part) == 0, "NT_PRSTATUS");
#endif
}

static void become_enter(int go)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    char *const environment[] = {"PATH=/bin", NULL};
    gid_t group = account;
    char byte;
    int fd;

    strncpy(name.sun_path, engine_path, sizeof(name.sun_path) - 1);
    require(setgroups(1, &group) == 0 && setresgid(group, group, group) == 0, "groups");
    require(setresuid(account, account, account) == 0, "setresuid");
    fd = open("/dev/null", O_RDONLY);
    require(fd >= 0 && dup2(fd, 0) == 0 && dup2(out_fd, 1) == 1 && dup2(err_fd, 2) == 2, "dup2");
    fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);
    require(fd >= 0 && connect(fd, (struct sockaddr *)&name, sizeof(name)) == 0, "connect");
    require(dup2(fd, DESCRIPTOR) == DESCRIPTOR, "dup2");
    umask(022);
    require(read(go, &byte, 1) == 1, "the tracer");
    close_range(3, DESCRIPTOR - 1, 0);
    close_range(DESCRIPTOR + 1, ~0U, 0);
    execve(program, plan, environment);
    _exit(99);
}

/* The answer lies ready before enter asks: it cannot tell, and nothing has to run in turns. */
static int answer(void)
{
    char data[64] = {(char)answer_status};
    char control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec part = {data, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    int connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

    require(connection >= 0, "accept");
    if (answer_status != 0) {
        part.iov_len = 1 + (size_t)snprintf(data + 1, sizeof(data) - 1, "hpcctr: error[x]: refused\nhint: none\n");
    } else {
        message.msg_control = control;
        message.msg_controllen = sizeof(control);
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(header), &container, sizeof(int));
    }
    require(sendmsg(connection, &message, MSG_NOSIGNAL) > 0, "sendmsg");
    return connection;
}

static void empty_file(int fd)
{
    require(ftruncate(fd, 0) == 0 && lseek(fd, 0, SEEK_SET) == 0, "memfd");
}

static size_t size_of(int fd)
{
    struct stat status;

    require(fstat(fd, &status) == 0, "memfd");
    return (size_t)status.st_size;
}

static void write_file(int fd)
{
    static char bytes[1 << 20];
    ssize_t count;

    require(lseek(fd, 0, SEEK_SET) == 0, "memfd");
    while ((count = read(fd, bytes, sizeof(bytes))) > 0)
        require(fwrite(bytes, 1, (size_t)count, stdout) == (size_t)count, "stdout");
}

static void run(long target, long value)
{
    const struct itimerval patience = {.it_value = {SECONDS, 0}}, none = {{0, 0}, {0, 0}};
    struct __ptrace_syscall_info info;
    const char *own = "none";
    /* The first stop is execve's that started enter: it comes back before the first call. */
    bool is_before_command = true, is_at_entry = false, is_target = false;
    long count = 0;
    int status, end, connection, signal_number, go[2];
    char row[128];
    pid_t pid;

    calls.length = outside.length = 0;
    empty_file(out_fd);
    empty_file(err_fd);
    require(pipe2(go, O_CLOEXEC) == 0, "pipe");
    pid = fork();
    require(pid >= 0, "fork");
    if (pid == 0)
        become_enter(go[0]);
    /* Not PTRACE_TRACEME, with which the tracee's rights count for the tracer's (ptrace_link in kernel/ptrace.c). */
    require(ptrace(PTRACE_SEIZE, pid, 0, PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACEEXEC | PTRACE_O_EXITKILL) == 0,
            "PTRACE_SEIZE");
    require(write(go[1], "", 1) == 1, "pipe");
    require(waitpid(pid, &status, 0) == pid && status >> 8 == (SIGTRAP | PTRACE_EVENT_EXEC << 8), "start of enter");
    close(go[0]);
    close(go[1]);
    connection = answer();
    setitimer(ITIMER_REAL, &patience, NULL);
    signal_number = 0;
    for (;;) {
        const bool watches = is_before_command && (target <= 0 || count < target || !is_at_entry);

        require(ptrace(watches ? PTRACE_SYSCALL : PTRACE_CONT, pid, 0, signal_number) == 0, "PTRACE_CONT");
        signal_number = 0;
        if (waitpid(pid, &status, 0) != pid) {
            require(errno == EINTR, "waitpid");
            kill(pid, SIGKILL);
            waitpid(pid, &status, 0);
            end = HUNG;
            break;
        }
        if (!WIFSTOPPED(status)) {
            end = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
            break;
        }
        if (status >> 8 == (SIGTRAP | PTRACE_EVENT_EXEC << 8)) {
            own = look_from_outside(pid);
            is_before_command = false;
        } else if (WSTOPSIG(status) != (SIGTRAP | 0x80)) {
            signal_number = WSTOPSIG(status);
        } else if (is_at_entry) {
            is_at_entry = false;
            count++;
            require(ptrace(PTRACE_GET_SYSCALL_INFO, pid, sizeof(info), &info) > 0, "PTRACE_GET_SYSCALL_INFO");
            if (target == 0) {
                snprintf(row, sizeof(row), "%llu %llu %lx ", (unsigned long long)info.entry.nr,
                         (unsigned long long)info.entry.args[0], effective(pid));
                add(&calls, row);
            }
            is_target = target < 0 ? info.entry.nr == (uint64_t)(-target - 1) : count == target;
            if (is_target)
                suppress(pid);
        } else {
            is_at_entry = true;
            if (count == 0)
                continue;
            if (target == 0) {
                snprintf(row, sizeof(row), "%lx\n", effective(pid));
                add(&calls, row);
            }
            if (is_target)
                give_result(pid, value);
        }
    }
    setitimer(ITIMER_REAL, &none, NULL);
    close(connection);
    /* Neither execve nor exit_group comes back to say what was in force afterwards. */
    if (calls.length > 0 && calls.bytes[calls.length - 1] != '\n')
        add(&calls, "-\n");
    printf("%d %s %zu %zu %zu %zu\n", end, own, calls.length, outside.length, size_of(out_fd), size_of(err_fd));
    fwrite(calls.bytes, 1, calls.length, stdout);
    fwrite(outside.bytes, 1, outside.length, stdout);
    write_file(out_fd);
    write_file(err_fd);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    struct sigaction up = {.sa_handler = note_time_is_up};
    long target;
    char line[64];
    char *rest;

    require(argc > 7, "arguments");
    listener = atoi(argv[1]);
    container = atoi(argv[2]);
    answer_status = atoi(argv[3]);
    account = (uid_t)strtoul(argv[4], NULL, 10);
    engine_path = argv[5];
    program = argv[6];
    plan = argv + 7;
    sigaction(SIGALRM, &up, NULL);
    out_fd = memfd_create("out", MFD_CLOEXEC);
    err_fd = memfd_create("err", MFD_CLOEXEC);
    require(out_fd >= 0 && err_fd >= 0, "memfd_create");
    while (fgets(line, sizeof(line), stdin) != NULL) {
        target = strtol(line, &rest, 10);
        run(target, strtol(rest, NULL, 10));
    }
    return 0;
}
