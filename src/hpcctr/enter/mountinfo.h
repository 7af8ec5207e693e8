/*
 * Reads /proc/self/mountinfo (proc_pid_mountinfo(5)) as a stream: a line may be longer than any buffer, since another
 * user's FUSE mount can lie at a path of any length.
 *
 *   ID parent major:minor root POINT OPTION[,OPTION]... [TAG]... - type source super-options
 */
#ifndef HPCCTR_ENTER_MOUNTINFO_H
#define HPCCTR_ENTER_MOUNTINFO_H

#include "caller.h"

enum { ID_FIELD = 0, POINT_FIELD = 4, OPTION_FIELD = 5, FIRST_TAG_FIELD = 6 };

static struct mount_line {
    uint64_t id;
    uint64_t attributes; /* MOUNT_ATTR_RDONLY, _NOSUID, _NODEV */
    bool is_shared;
    bool is_unbindable;
    /* As written, so up to four characters a byte. The rest of a longer path is left out: it is only compared with
     * paths shorter than PATH_MAX. */
    char point[4 * PATH_MAX + 1];
    size_t point_length;

    unsigned int field;
    bool has_tags_behind;
    char word[16];
    size_t word_length;
} line;

_Noreturn static void die_mountinfo(const char *reason)
{
    die(FAILED, "view", "/proc/self/mountinfo", reason, ASK_DOCTOR);
}

static bool is_octal(char c)
{
    return c >= '0' && c <= '7';
}

/* \ooo stands for blank, tab, newline and backslash. */
static void decode_point(void)
{
    size_t to = 0;
    const char *at;

    for (size_t from = 0; from < line.point_length; from++) {
        at = line.point + from;
        if (*at != '\\') {
            line.point[to++] = *at;
            continue;
        }
        if (from + 3 >= line.point_length) {
            if (line.point_length < sizeof(line.point) - 1)
                die_mountinfo("a mount point that ends within an escape");
            break;
        }
        if (!is_octal(at[1]) || !is_octal(at[2]) || !is_octal(at[3]))
            die_mountinfo("a mount point with an unknown escape");
        line.point[to++] = (char)((at[1] - '0') * 64 + (at[2] - '0') * 8 + (at[3] - '0'));
        from += 3;
    }
    line.point[to] = '\0';
}

static void end_word(void)
{
    line.word[line.word_length < sizeof(line.word) ? line.word_length : sizeof(line.word) - 1] = '\0';
    if (line.field == ID_FIELD) {
        line.id = 0;
        for (const char *digit = line.word; *digit >= '0' && *digit <= '9'; digit++)
            line.id = line.id * 10 + (uint64_t)(*digit - '0');
    } else if (line.field == OPTION_FIELD) {
        if (equal(line.word, "ro"))
            line.attributes |= MOUNT_ATTR_RDONLY;
        else if (equal(line.word, "nosuid"))
            line.attributes |= MOUNT_ATTR_NOSUID;
        else if (equal(line.word, "nodev"))
            line.attributes |= MOUNT_ATTR_NODEV;
    } else if (line.field >= FIRST_TAG_FIELD && !line.has_tags_behind) {
        line.has_tags_behind = equal(line.word, "-");
        line.is_shared = line.is_shared || starts_with(line.word, "shared:");
        line.is_unbindable = line.is_unbindable || equal(line.word, "unbindable");
    }
    line.word_length = 0;
}

static void take(char c, void (*visit)(void))
{
    if (c == ',' && line.field == OPTION_FIELD) {
        end_word();
    } else if (c == ' ') {
        end_word();
        line.field++;
    } else if (c == '\n') {
        end_word();
        if (!line.has_tags_behind)
            die_mountinfo("a line without separator");
        decode_point();
        visit();
        memset(&line, 0, offsetof(struct mount_line, point));
        line.point_length = 0;
        line.field = 0;
        line.has_tags_behind = false;
    } else {
        if (line.field == POINT_FIELD && line.point_length < sizeof(line.point) - 1)
            line.point[line.point_length++] = c;
        if (line.word_length < sizeof(line.word) - 1)
            line.word[line.word_length++] = c;
    }
}

/* Calls visit with `line` filled in, for every mount of this process's namespace below its root directory. */
static void visit_mounts(void (*visit)(void))
{
    static char chunk[16384];
    bool is_empty = true;
    long count;
    long fd = sys4(__NR_openat, proc_fd, POINTER("self/mountinfo"), O_RDONLY | O_CLOEXEC, 0);

    if (fd < 0)
        die_of(FAILED, "view", "/proc/self/mountinfo", fd, ASK_DOCTOR);
    for (;;) {
        count = sys3(__NR_read, fd, POINTER(chunk), sizeof(chunk));
        if (count == -EINTR)
            continue;
        if (count < 0)
            die_of(FAILED, "view", "/proc/self/mountinfo", count, ASK_DOCTOR);
        if (count == 0)
            break;
        is_empty = false;
        for (long at = 0; at < count; at++)
            take(chunk[at], visit);
    }
    if (is_empty || line.field != 0 || line.word_length != 0)
        die_mountinfo("empty or cut off");
    sys1(__NR_close, fd);
}

#endif
