/*
 * Target `report`: any path in an error. What is written is two lines without control characters, ends in a status of
 * ours, and says the path again in a hint that is about it.
 */
#include "harness.h"

static size_t written;

static long simulated_call(long number, long a, long b, long c, long d, long e, long f)
{
    (void)d, (void)e, (void)f;
    if (number != __NR_write)
        return 0;
    expect(a == 2 && b == POINTER(report.text) + (long)written && (size_t)c == report.length - written);
    /* A descriptor that takes a part at a time. */
    c = c > 1000 ? 1000 : c;
    written += (size_t)c;
    return c;
}

static void consume(const uint8_t *data, size_t size)
{
    char *path = exact_copy(data, size, true);

    for (int with_number = 0; with_number < 2; with_number++) {
        start_anew();
        written = 0;
        if (setjmp(end_of_enter) == 0) {
            if (with_number)
                die_of(FAILED, "mount-source", path, size > 1 ? -(long)(data[0] * 256 + data[1]) : -1, "ls -ld ");
            die(REFUSED, "mount-source", path, "a reason", "ls -ld ");
        }
        expect(end_status == (with_number ? 125 : 126));
        expect(written == report.length);
        expect_lawful_report();
    }
    free(path);
}
