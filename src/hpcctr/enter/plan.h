/*
 * The launch plan, format 1: every word of it comes from the caller and is believed only after it was checked here.
 *
 *   NAME "1" SOCK PERSONALITY PDEATHSIG NMOUNTS (SOURCE TARGET MODE)... CWD NCAND CANDIDATE... ARG0 ARG...
 */
#ifndef HPCCTR_ENTER_PLAN_H
#define HPCCTR_ENTER_PLAN_H

#include "report.h"

#define HPCCTR_RUN "/run/hpcctr"

enum { MAX_MOUNTS = 128, MAX_CANDIDATES = 256, LAST_SIGNAL = 64 };

struct mount {
    const char *source;
    const char *target;
    uint64_t attributes; /* MOUNT_ATTR_* */
    int source_fd;
    int tree_fd;
    uint64_t id; /* as in mountinfo, once attached */
    bool was_seen;
};

/* Static, not on the stack: the caller chooses RLIMIT_STACK and how much of it argv fills. */
static struct {
    int socket;
    unsigned int personality;
    int pdeathsig;
    struct mount mounts[MAX_MOUNTS];
    struct mount *mounts_end;
    const char *cwd;
    unsigned long candidate_count;
    char **candidates;
    char **argv;
} plan;

static char **untrusted_words;
static long untrusted_word_count;

_Noreturn static void die_plan(const char *what, const char *reason)
{
    die(FAILED, "plan", what, reason, "hpcctr run starts hpcctr-enter; nothing else has to");
}

static char *next_word(const char *what)
{
    if (untrusted_word_count <= 0)
        die_plan(what, "missing from the launch plan");
    untrusted_word_count--;
    return *untrusted_words++;
}

/* Decimal digits only: no sign, no blank, no leading zero. */
static unsigned long next_number(const char *what, unsigned long least, unsigned long most)
{
    const char *word = next_word(what);
    unsigned long number = 0;

    if (word[0] == '\0' || (word[0] == '0' && word[1] != '\0'))
        die_plan(what, "not a plain decimal number");
    for (; *word != '\0'; word++) {
        if (*word < '0' || *word > '9')
            die_plan(what, "not a plain decimal number");
        number = number * 10 + (unsigned long)(*word - '0');
        if (number > most) /* most fits 32 bits, so the next step cannot overflow */
            die_plan(what, "too large");
    }
    if (number < least)
        die_plan(what, "too small");
    return number;
}

static const char *next_path(const char *what)
{
    const char *path = next_word(what);

    if (path[0] != '/')
        die_plan(what, "not an absolute path");
    if (length_of(path) >= PATH_MAX)
        die_plan(what, "too long for a path");
    return path;
}

_Noreturn static void die_target(const char *target, const char *reason)
{
    die(REFUSED, "mount-target", target, reason, "choose another path inside: -v SOURCE:TARGET");
}

/* No "//", "/./", "/../" and nothing of the kind at the end; this refuses "/" as well. */
static void require_normalised(const char *target)
{
    for (const char *at = target; *at != '\0'; at++) {
        if (*at != '/')
            continue;
        if (at[1] == '/' || at[1] == '\0' || (at[1] == '.' && (at[2] == '/' || at[2] == '\0')) ||
            (at[1] == '.' && at[2] == '.' && (at[3] == '/' || at[3] == '\0')))
            die_target(target, "not a normalised path below /");
    }
}

static void require_lawful_target(const struct mount *mount)
{
    /* An array of arrays: a pointer in data would need relocating, and without a libc nobody does. */
    static const char kernel_views[3][6] = {"/proc", "/sys", "/dev"};
    const char *top;

    require_normalised(mount->target);
    if (is_at_or_beneath(mount->target, HPCCTR_RUN))
        die_target(mount->target, "nothing may be mounted there");
    for (int i = 0; i < 3; i++) {
        top = kernel_views[i];
        if (!is_at_or_beneath(mount->target, top))
            continue;
        if (!equal(mount->target, top) || !starts_with(mount->source, top) ||
            !equal(mount->source + length_of(top), "/."))
            die_target(mount->target, "only the host's own /proc, /sys and /dev may be mounted there");
    }
}

static void parse_mount(struct mount *mount)
{
    const char *mode;

    mount->source = next_path("SOURCE");
    mount->target = next_path("TARGET");
    mode = next_word("MODE");
    require_lawful_target(mount);
    for (const struct mount *earlier = plan.mounts; earlier < mount; earlier++)
        if (is_at_or_beneath(earlier->target, mount->target))
            die_target(mount->target, "it would hide a mount that comes before it in the plan");
    mount->attributes = MOUNT_ATTR_NOSUID;
    /* Devices come with /dev only, where its file modes and the caller's device cgroup decide. */
    if (!equal(mount->target, "/dev"))
        mount->attributes |= MOUNT_ATTR_NODEV;
    if (equal(mode, "ro"))
        mount->attributes |= MOUNT_ATTR_RDONLY;
    else if (!equal(mode, "rw"))
        die_plan("MODE", "neither rw nor ro");
}

static void parse_plan(long untrusted_argc, char **untrusted_argv)
{
    untrusted_words = untrusted_argv;
    untrusted_word_count = untrusted_argc;
    next_word("NAME");
    if (!equal(next_word("plan format"), "1"))
        die_plan("plan format", "not 1: hpcctr and hpcctr-enter are of different versions");
    plan.socket = (int)next_number("SOCK", 3, INT32_MAX);
    /* 0xffffffff asks personality(2) for the value and sets nothing. */
    plan.personality = (unsigned int)next_number("PERSONALITY", 0, UINT32_MAX - 1);
    plan.pdeathsig = (int)next_number("PDEATHSIG", 0, LAST_SIGNAL);
    plan.mounts_end = plan.mounts + next_number("NMOUNTS", 0, MAX_MOUNTS);
    for (struct mount *mount = plan.mounts; mount < plan.mounts_end; mount++)
        parse_mount(mount);
    plan.cwd = next_path("CWD");
    plan.candidate_count = next_number("NCAND", 1, MAX_CANDIDATES);
    plan.candidates = untrusted_words;
    for (unsigned long i = 0; i < plan.candidate_count; i++)
        if (next_word("CANDIDATE")[0] == '\0')
            die_plan("CANDIDATE", "empty");
    plan.argv = untrusted_words;
    next_word("ARG0");
}

#endif
