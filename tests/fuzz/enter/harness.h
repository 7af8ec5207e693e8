/*
 * enter's own source, whole and as it is, with the world replaced: system calls are answered by simulated_call, and
 * leave comes back here instead of ending the process. Included by each target once.
 *
 * A target defines simulated_call and consume; what differs from what it expects ends in a trap.
 */
#ifndef HPCCTR_FUZZ_HARNESS_H
#define HPCCTR_FUZZ_HARNESS_H

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>

/* Declared by hand: the C library's headers and the kernel's, which enter uses, do not go together. */
void *malloc(size_t size);
void free(void *memory);
int memcmp(const void *one, const void *other, size_t size);

#define memset enter_memset
#define memcpy enter_memcpy
#define leave leave_for_good
#include "sys.h"
#undef leave

static long simulated_call(long number, long a, long b, long c, long d, long e, long f);
#define sys6 simulated_call

static jmp_buf end_of_enter;
static int end_status;

_Noreturn static void leave(int status)
{
    end_status = status;
    longjmp(end_of_enter, 1);
}

#include "enter.c"

static void expect(bool holds)
{
    if (!holds)
        __builtin_trap();
}

/* Everything enter keeps between its functions, as at its start. */
static void start_anew(void)
{
    memset(&plan, 0, sizeof(plan));
    memset(&line, 0, sizeof(line));
    memset(&report, 0, sizeof(report));
    may_write_errors = true;
    end_status = -1;
}

/* Two lines, all of them plain: nothing a terminal would take for a command. */
static void expect_lawful_report(void)
{
    size_t lines = 0;

    expect(report.length > 0 && report.length < sizeof(report.text));
    expect(starts_with(report.text, "hpcctr: error["));
    expect(report.text[report.length - 1] == '\n');
    for (size_t at = 0; at < report.length; at++) {
        const unsigned char byte = (unsigned char)report.text[at];

        lines += byte == '\n';
        expect(byte == '\n' || (byte >= 0x20 && byte != 0x7f));
        /* U+0080 to U+009F, and a byte of that range after something that is no character of UTF-8. */
        if (byte >= 0x80 && byte < 0xa0)
            expect((unsigned char)report.text[at - 1] >= 0x80 && (unsigned char)report.text[at - 1] != 0xc2);
    }
    expect(lines == 2);
}

/* A copy that ends where its memory ends, so that one byte too far is found. */
static char *exact_copy(const uint8_t *data, size_t size, bool is_text)
{
    char *copy = malloc(size + is_text + (size + is_text == 0));

    for (size_t at = 0; at < size; at++)
        copy[at] = (char)data[at];
    if (is_text)
        copy[size] = '\0';
    return copy;
}

static void consume(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    consume(data, size);
    return 0;
}

#endif
