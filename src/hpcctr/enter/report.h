/*
 * How enter ends when it cannot go on: one write of two lines to descriptor 2, and an exit status.
 *
 *   hpcctr: error[SLUG]: WHAT: REASON
 *   hint: WHAT TO DO
 *
 * A hint that ends in a blank goes on with WHAT, a path.
 *
 * Slugs and statuses are those of src/hpcctr/errors.py.
 */
#ifndef HPCCTR_ENTER_REPORT_H
#define HPCCTR_ENTER_REPORT_H

#include "sys.h"

enum { FAILED = 125, REFUSED = 126, NOT_FOUND = 127 };

#define ASK_DOCTOR "hpcctr doctor"

/* False when 2 was closed at the start: whatever lies there by now is something enter opened. */
static bool may_write_errors;

static struct {
    char text[3 * PATH_MAX];
    size_t length;
} report;

/* For reason and hint, with the path it may name, whatever the length of what they are about. */
#define REPORT_RESERVE (PATH_MAX + 1024)

static void append(char c)
{
    if (report.length < sizeof(report.text))
        report.text[report.length++] = c;
}

/* Whether a terminal may take the byte for a control character: one of ASCII, or of 0x80 to 0x9f, unless it continues a
 * character of UTF-8 that is none of these itself (they begin with 0xc2). */
static bool is_control(unsigned char previous, unsigned char byte)
{
    return byte < 0x20 || byte == 0x7f || (byte >= 0x80 && byte < 0xa0 && (previous < 0x80 || previous == 0xc2));
}

static void say_part(const char *text, size_t length)
{
    unsigned char previous = '\0';
    unsigned char byte;

    for (; length > 0; length--, text++) {
        byte = (unsigned char)*text;
        append(is_control(previous, byte) ? '?' : *text);
        previous = is_control(previous, byte) ? '?' : byte;
    }
}

/* Paths go to a terminal; control characters in them must not. */
static void say(const char *text)
{
    say_part(text, length_of(text));
}

static void say_hint(const char *hint, const char *path)
{
    const size_t length = length_of(hint);
    size_t path_length = length_of(path);

    say(hint);
    if (length == 0 || hint[length - 1] != ' ')
        return;
    /* A directory is written as it was opened, "/path/.". */
    if (path_length > 2 && path[path_length - 2] == '/' && path[path_length - 1] == '.')
        path_length -= 2;
    say_part(path, path_length < PATH_MAX ? path_length : PATH_MAX);
}

static void write_out(const char *text, size_t length)
{
    /* The kernel's struct sigaction with SIG_IGN: a closed pipe at 2, or a file there that may not grow any more, must
     * not turn the exit status into a signal. */
    static const uintptr_t ignore[4] = {1, 0, 0, 0};
    long written;

    if (!may_write_errors)
        return;
    sys4(__NR_rt_sigaction, SIGPIPE, POINTER(ignore), 0, 8);
    sys4(__NR_rt_sigaction, SIGXFSZ, POINTER(ignore), 0, 8);
    while (length > 0) {
        written = sys3(__NR_write, 2, POINTER(text), (long)length);
        if (written == -EINTR)
            continue;
        if (written <= 0)
            return;
        text += written;
        length -= (size_t)written;
    }
}

_Noreturn static void die(int status, const char *slug, const char *what, const char *reason, const char *hint)
{
    say("hpcctr: error[");
    say(slug);
    say("]: ");
    say(what);
    if (report.length > sizeof(report.text) - REPORT_RESERVE)
        report.length = sizeof(report.text) - REPORT_RESERVE;
    say(": ");
    say(reason);
    append('\n');
    say("hint: ");
    say_hint(hint, what);
    append('\n');
    write_out(report.text, report.length);
    leave(status);
}

/* The digits of a number; overwritten by the next call. */
static const char *decimal(unsigned long number)
{
    static char digits[24];
    size_t at = sizeof(digits) - 1;

    do {
        digits[--at] = (char)('0' + number % 10);
        number /= 10;
    } while (number > 0);
    return digits + at;
}

/* error: the negative number a system call returned. */
_Noreturn static void die_of(int status, const char *slug, const char *what, long error, const char *hint)
{
    static char text[] = "error number ......";
    size_t at = sizeof("error number ") - 1;
    const char *digit;

    switch (-error) {
    case EPERM: die(status, slug, what, "operation not permitted", hint);
    case ENOENT: die(status, slug, what, "no such file or directory", hint);
    case EACCES: die(status, slug, what, "permission denied", hint);
    case ENOTDIR: die(status, slug, what, "not a directory", hint);
    case ELOOP: die(status, slug, what, "the path leads through a symbolic link", hint);
    case EMFILE: die(status, slug, what, "the limit of open files is too low", "ulimit -n 1024");
    case ENOSYS: die(status, slug, what, "the kernel lacks this call, or a seccomp filter hides it", hint);
    case ENOEXEC: die(status, slug, what, "not a program this machine can run", hint);
    case E2BIG: die(status, slug, what, "arguments and environment are too long", hint);
    case ENOMEM: die(status, slug, what, "out of memory", hint);
    case EINVAL: die(status, slug, what, "the kernel refuses it (EINVAL)", hint);
    default: break;
    }
    for (digit = decimal((unsigned long)-error); *digit != '\0' && at < sizeof(text) - 1; digit++)
        text[at++] = *digit;
    text[at] = '\0';
    die(status, slug, what, text, hint);
}

#endif
