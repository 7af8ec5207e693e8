/*
 * Target `mountinfo`: the first line is the path of a source, the second how many bytes each read(2) gives, the rest is
 * /proc/self/mountinfo. A second reader, which has all of it in memory and takes it apart from both ends, says what enter
 * must have seen, and whether an unbindable mount hides something beneath the source.
 */
#include "harness.h"

static const uint8_t *file;
static size_t file_size, file_at, read_size;
static char source_path[PATH_MAX];
static size_t source_length;

static long simulated_call(long number, long a, long b, long c, long d, long e, long f)
{
    (void)a, (void)e, (void)f;
    if (number == __NR_write)
        return c;
    if (number == __NR_readlinkat) {
        const size_t length = source_length < (size_t)d ? source_length : (size_t)d;

        for (size_t at = 0; at < length; at++)
            ((char *)c)[at] = source_path[at];
        return (long)length;
    }
    if (number == __NR_read) {
        size_t count = file_size - file_at;

        if (count > (size_t)c)
            count = (size_t)c;
        if (count > read_size)
            count = read_size;
        for (size_t at = 0; at < count; at++)
            ((char *)b)[at] = (char)file[file_at + at];
        file_at += count;
        return (long)count;
    }
    expect(number == __NR_openat || number == __NR_close || number == __NR_rt_sigaction);
    return number == __NR_openat ? 7 : 0;
}

/* ---- the second reader ---- */

enum { MOST_LINES = 256, LONGEST_POINT = 4 * PATH_MAX };

struct seen {
    uint64_t id, attributes;
    bool is_shared, is_unbindable;
    const char *point;
    size_t point_length;
};

static struct seen expected[MOST_LINES];
static size_t expected_count, visited;
static bool is_broken;
static char points[1 << 20];
static size_t points_used;

struct field {
    const uint8_t *at;
    size_t length;
};

static bool is(struct field field, const char *other)
{
    size_t length = 0;

    while (other[length])
        length++;
    return field.length == length && memcmp(field.at, other, length) == 0;
}

static bool begins(struct field field, const char *other)
{
    size_t length = 0;

    while (other[length])
        length++;
    return field.length >= length && memcmp(field.at, other, length) == 0;
}

/* The field of this number within a line, of length 0 when there is none. */
static struct field nth(const uint8_t *text, size_t length, size_t number, uint8_t separator)
{
    struct field field = {text, 0};
    size_t at = 0;

    for (; number > 0 && at < length; at++)
        number -= text[at] == separator;
    if (number > 0)
        return field;
    field.at = text + at;
    while (at + field.length < length && field.at[field.length] != separator)
        field.length++;
    return field;
}

static size_t count_of(const uint8_t *text, size_t length, uint8_t byte)
{
    size_t count = 0;

    for (size_t at = 0; at < length; at++)
        count += text[at] == byte;
    return count;
}

/* False for an escape that is none. */
static bool decode(struct field field, struct seen *seen)
{
    const bool is_cut = field.length > LONGEST_POINT;
    size_t length = is_cut ? LONGEST_POINT : field.length;

    seen->point = points + points_used;
    for (size_t at = 0; at < length; at++) {
        unsigned int value = field.at[at];

        if (value == '\\') {
            if (length - at < 4) {
                if (length < LONGEST_POINT)
                    return false;
                break;
            }
            value = 0;
            for (size_t digit = 1; digit <= 3; digit++) {
                if (field.at[at + digit] < '0' || field.at[at + digit] > '7')
                    return false;
                value = value * 8 + (field.at[at + digit] & 7U);
            }
            at += 3;
        }
        expect(points_used < sizeof(points));
        points[points_used++] = (char)value;
    }
    seen->point_length = (size_t)(points + points_used - seen->point);
    return true;
}

static bool look_at(const uint8_t *text, size_t length, struct seen *seen)
{
    const size_t fields = count_of(text, length, ' ') + 1;
    struct field options = nth(text, length, 5, ' ');
    struct field id = nth(text, length, 0, ' ');
    size_t separator;

    *seen = (struct seen){0};
    /* As long as a number of the kernel's can be. */
    for (size_t at = 0; at < id.length && at < 15 && id.at[at] >= '0' && id.at[at] <= '9'; at++)
        seen->id = seen->id * 10 + id.at[at] - '0';
    for (size_t at = 0; fields > 5 && at <= count_of(options.at, options.length, ','); at++) {
        struct field option = nth(options.at, options.length, at, ',');

        seen->attributes |= is(option, "ro") ? 1 : is(option, "nosuid") ? 2 : is(option, "nodev") ? 4 : 0;
    }
    for (separator = 6; separator < fields && !is(nth(text, length, separator, ' '), "-"); separator++) {
        seen->is_shared = seen->is_shared || begins(nth(text, length, separator, ' '), "shared:");
        seen->is_unbindable = seen->is_unbindable || is(nth(text, length, separator, ' '), "unbindable");
    }
    return separator < fields && decode(nth(text, length, 4, ' '), seen);
}

static void look_at_all(void)
{
    size_t begin = 0;

    expected_count = points_used = 0;
    is_broken = file_size == 0 || file[file_size - 1] != '\n';
    for (size_t at = 0; at < file_size; at++) {
        if (file[at] != '\n')
            continue;
        if (!look_at(file + begin, at - begin, &expected[expected_count])) {
            is_broken = true;
            return;
        }
        expected_count++;
        begin = at + 1;
    }
}

static bool hides_something(const struct seen *seen)
{
    /* A file name has no zero byte; what lies behind one is not compared. */
    size_t length = 0;

    if (!seen->is_unbindable)
        return false;
    while (length < seen->point_length && seen->point[length] != '\0')
        length++;
    if (source_length == 1 && source_path[0] == '/')
        return length > 0 && seen->point[0] == '/';
    return length >= source_length && memcmp(seen->point, source_path, source_length) == 0 &&
           (length == source_length || seen->point[source_length] == '/');
}

/* ---- both ---- */

static void compare(void)
{
    const struct seen *wanted = &expected[visited];

    expect(visited < expected_count);
    expect(line.id == wanted->id && line.attributes == wanted->attributes);
    expect(line.is_shared == wanted->is_shared && line.is_unbindable == wanted->is_unbindable);
    expect(memcmp(line.point, wanted->point, wanted->point_length) == 0 && line.point[wanted->point_length] == '\0');
    visited++;
}

static size_t take_line(const uint8_t *data, size_t size, struct field *taken)
{
    *taken = nth(data, size, 0, '\n');
    return taken->length < size ? taken->length + 1 : size;
}

static void consume(const uint8_t *data, size_t size)
{
    struct field path, step;
    size_t at = take_line(data, size, &path);
    char *copy;

    at += take_line(data + at, size - at, &step);
    if (path.length == 0 || path.length >= sizeof(source_path) || count_of(path.at, path.length, 0) > 0 ||
        path.at[0] != '/' || count_of(data, size, '\n') >= MOST_LINES || count_of(data + at, size - at, 0) > 0)
        return;
    for (source_length = 0; source_length < path.length; source_length++)
        source_path[source_length] = (char)path.at[source_length];
    read_size = 1;
    for (size_t digit = 0; digit < step.length && digit < 5; digit++)
        read_size = read_size * 7 + step.at[digit];
    copy = exact_copy(data + at, size - at, false);
    file = (const uint8_t *)copy;
    file_size = size - at;
    look_at_all();

    start_anew();
    file_at = visited = 0;
    if (setjmp(end_of_enter) == 0) {
        visit_mounts(compare);
        expect(!is_broken);
    } else {
        expect(is_broken && end_status == 125);
        expect_lawful_report();
    }
    expect(visited == expected_count);

    start_anew();
    file_at = 0;
    plan.mounts[0].source = "/source";
    plan.mounts_end = plan.mounts + 1;
    if (setjmp(end_of_enter) == 0) {
        visit_mounts(refuse_unbindable);
        for (size_t number = 0; number < expected_count; number++)
            expect(!hides_something(&expected[number]));
    } else {
        bool is_hidden = is_broken;

        for (size_t number = 0; number < expected_count; number++)
            is_hidden = is_hidden || hides_something(&expected[number]);
        expect(is_hidden);
        expect_lawful_report();
    }
    free(copy);
}
