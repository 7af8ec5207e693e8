/*
 * Target `plan`: bytes are argv, words separated by zero bytes. A second parser, written from the README and not from
 * plan.h, says whether the plan is lawful; enter must say the same, and must have understood the same.
 */
#include "harness.h"

static long simulated_call(long number, long a, long b, long c, long d, long e, long f)
{
    (void)a, (void)b, (void)d, (void)e, (void)f;
    expect(number == __NR_write || number == __NR_rt_sigaction);
    return number == __NR_write ? c : 0;
}

enum { MOST_WORDS = 2000 };

static char *words[MOST_WORDS + 1];
static size_t word_count;

/* ---- the second parser ---- */

struct text {
    const char *at;
    size_t length;
};

static struct text text_of(const char *word)
{
    struct text text = {word, 0};

    while (word[text.length])
        text.length++;
    return text;
}

static bool is(struct text text, const char *other)
{
    struct text wanted = text_of(other);

    return text.length == wanted.length && memcmp(text.at, other, wanted.length) == 0;
}

/* A number as printed, between the two; -1 for anything else. Printed and compared, where enter multiplies and adds. */
static long number_of(const char *word, long least, long most)
{
    struct text text = text_of(word);
    char printed[24];
    size_t length;
    long value = 0;

    if (text.length == 0 || text.length > 10)
        return -1;
    for (size_t at = 0; at < text.length; at++)
        value = value * 10 + (word[at] & 0xf);
    length = 0;
    for (long rest = value; rest > 0 || length == 0; rest /= 10)
        printed[length++] = (char)('0' + rest % 10);
    if (length != text.length)
        return -1;
    for (size_t at = 0; at < length; at++)
        if (printed[length - 1 - at] != word[at])
            return -1;
    return value < least || value > most ? -1 : value;
}

struct parts {
    struct text part[2100];
    size_t count;
    bool is_normal;
};

/* The components of a path; normal when none is empty, `.` or `..`, and there is one. */
static void split(const char *path, struct parts *parts)
{
    struct text rest = text_of(path);

    parts->count = 0;
    parts->is_normal = rest.length > 1;
    while (rest.length > 0) {
        struct text part = {rest.at + 1, 0};

        while (part.length + 1 < rest.length && part.at[part.length] != '/')
            part.length++;
        parts->is_normal = parts->is_normal && part.length > 0 && !is(part, ".") && !is(part, "..");
        if (parts->count < 2100)
            parts->part[parts->count++] = part;
        rest.at += part.length + 1;
        rest.length -= part.length + 1;
    }
}

static bool is_beneath_or_same(const struct parts *path, const struct parts *top)
{
    if (path->count < top->count)
        return false;
    for (size_t at = 0; at < top->count; at++)
        if (path->part[at].length != top->part[at].length ||
            memcmp(path->part[at].at, top->part[at].at, top->part[at].length) != 0)
            return false;
    return true;
}

static bool is_path(const char *word)
{
    return word[0] == '/' && text_of(word).length < 4096;
}

static struct parts targets[128];

static bool is_lawful_mount(char *const *word, size_t number)
{
    static const char *const views[] = {"/proc", "/sys", "/dev"};
    static struct parts top;
    struct parts *target = &targets[number];

    if (!is_path(word[0]) || !is_path(word[1]) || !(is(text_of(word[2]), "ro") || is(text_of(word[2]), "rw")))
        return false;
    split(word[1], target);
    split("/run/hpcctr", &top);
    if (!target->is_normal || is_beneath_or_same(target, &top))
        return false;
    for (size_t view = 0; view < 3; view++) {
        split(views[view], &top);
        if (!is_beneath_or_same(target, &top))
            continue;
        if (target->count != 1 || text_of(word[0]).length != text_of(views[view]).length + 2 ||
            memcmp(word[0], views[view], text_of(views[view]).length) != 0 ||
            memcmp(word[0] + text_of(views[view]).length, "/.", 2) != 0)
            return false;
    }
    for (size_t earlier = 0; earlier < number; earlier++)
        if (is_beneath_or_same(&targets[earlier], target))
            return false;
    return true;
}

/* Where CWD stands, or 0 for an unlawful plan. */
static size_t place_of_cwd(void)
{
    long mounts, candidates;
    size_t cwd;

    if (word_count < 6 || !is(text_of(words[1]), "1"))
        return 0;
    mounts = number_of(words[5], 0, 128);
    if (number_of(words[2], 3, 2147483647) < 0 || number_of(words[3], 0, 4294967294) < 0 ||
        number_of(words[4], 0, 64) < 0 || mounts < 0)
        return 0;
    cwd = 6 + 3 * (size_t)mounts;
    if (word_count < cwd + 2)
        return 0;
    for (size_t number = 0; number < (size_t)mounts; number++)
        if (!is_lawful_mount(words + 6 + 3 * number, number))
            return 0;
    candidates = number_of(words[cwd + 1], 1, 256);
    if (!is_path(words[cwd]) || candidates < 0 || word_count < cwd + 2 + (size_t)candidates + 1)
        return 0;
    for (size_t at = 0; at < (size_t)candidates; at++)
        if (words[cwd + 2 + at][0] == '\0')
            return 0;
    return cwd;
}

static void expect_understood(size_t cwd)
{
    const size_t mounts = (size_t)number_of(words[5], 0, 128);

    expect(plan.socket == number_of(words[2], 3, 2147483647));
    expect(plan.personality == (unsigned long)number_of(words[3], 0, 4294967294));
    expect(plan.pdeathsig == number_of(words[4], 0, 64));
    expect(plan.mounts_end == plan.mounts + mounts);
    for (size_t number = 0; number < mounts; number++) {
        const bool is_dev = is(text_of(words[7 + 3 * number]), "/dev");
        const bool is_read_only = is(text_of(words[8 + 3 * number]), "ro");

        expect(plan.mounts[number].source == words[6 + 3 * number]);
        expect(plan.mounts[number].target == words[7 + 3 * number]);
        /* MOUNT_ATTR_RDONLY, _NOSUID, _NODEV */
        expect(plan.mounts[number].attributes == 2U + (is_dev ? 0U : 4U) + (is_read_only ? 1U : 0U));
    }
    expect(plan.cwd == words[cwd]);
    expect(plan.candidate_count == (unsigned long)number_of(words[cwd + 1], 1, 256));
    expect(plan.candidates == words + cwd + 2);
    expect(plan.argv == words + cwd + 2 + plan.candidate_count);
}

static void consume(const uint8_t *data, size_t size)
{
    size_t begin = 0;
    size_t cwd;

    word_count = 0;
    for (size_t at = 0; at <= size && word_count < MOST_WORDS; at++)
        if (at == size || data[at] == 0) {
            words[word_count++] = exact_copy(data + begin, at - begin, true);
            begin = at + 1;
        }
    words[word_count] = NULL;
    start_anew();
    cwd = place_of_cwd();
    if (setjmp(end_of_enter) == 0) {
        parse_plan((long)word_count, words);
        expect(cwd != 0);
        expect_understood(cwd);
    } else {
        expect(cwd == 0);
        expect(end_status == 125 || end_status == 126);
        expect_lawful_report();
    }
    for (size_t at = 0; at < word_count; at++)
        free(words[at]);
}
