/* Preloaded into slurmd where a test shows it the cgroup2 tree only: /proc/PID/cgroup has the line of version 2 alone.
 *
 * A machine that keeps controllers in version 1 says so there to every process, whatever is mounted, and Slurm's
 * cgroup/v2 plug-in refuses to start on it. Slurm opens the file with open(2) or fopen(3).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int is_cgroup(const char *path)
{
    size_t length = strlen(path);
    return strncmp(path, "/proc/", 6) == 0 && length > 7 && strcmp(path + length - 7, "/cgroup") == 0;
}

/* A descriptor of what the file says of version 2; the given one is closed. */
static int only_version_2(int file)
{
    char text[8192];
    ssize_t length = read(file, text, sizeof text - 1);
    close(file);
    if (length < 0)
        return -1;
    text[length] = '\0';
    const char *line = strstr(text, "0::");
    if (line == NULL)
        line = text + length;
    int shown = memfd_create("cgroup", MFD_CLOEXEC);
    if (shown >= 0 && (write(shown, line, strlen(line)) < 0 || lseek(shown, 0, SEEK_SET) < 0)) {
        close(shown);
        return -1;
    }
    return shown;
}

static int opened(const char *name, const char *path, int flags, va_list arguments)
{
    int (*next)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, name);
    int mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(arguments, int) : 0;
    int file = next(path, flags, mode);
    return file >= 0 && is_cgroup(path) ? only_version_2(file) : file;
}

int open(const char *path, int flags, ...)
{
    va_list arguments;
    va_start(arguments, flags);
    int file = opened("open", path, flags, arguments);
    va_end(arguments);
    return file;
}

int open64(const char *path, int flags, ...)
{
    va_list arguments;
    va_start(arguments, flags);
    int file = opened("open64", path, flags, arguments);
    va_end(arguments);
    return file;
}

static FILE *fopened(const char *name, const char *path, const char *mode)
{
    if (is_cgroup(path)) {
        int file = open(path, O_RDONLY | O_CLOEXEC);
        return file < 0 ? NULL : fdopen(file, "r");
    }
    FILE *(*next)(const char *, const char *) = (FILE * (*)(const char *, const char *)) dlsym(RTLD_NEXT, name);
    return next(path, mode);
}

FILE *fopen(const char *path, const char *mode)
{
    return fopened("fopen", path, mode);
}

FILE *fopen64(const char *path, const char *mode)
{
    return fopened("fopen64", path, mode);
}
