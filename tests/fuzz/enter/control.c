/*
 * Target `control`: the control data of a message (cmsg(3)). enter takes a descriptor from it when it is exactly one
 * SCM_RIGHTS with one descriptor, and from nothing else. The bytes before `length` are all that may be read.
 */
#include "harness.h"

static long simulated_call(long number, long a, long b, long c, long d, long e, long f)
{
    (void)number, (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
    __builtin_trap();
}

static long little_endian(const uint8_t *data, size_t count)
{
    unsigned long value = 0;

    for (size_t at = count; at > 0; at--)
        value = value << 8 | data[at - 1];
    return (long)value;
}

static void consume(const uint8_t *data, size_t size)
{
    char *copy = exact_copy(data, size, false);
    int fd = only_descriptor((const unsigned char *)copy, size);

    /* cmsg_len 20, SOL_SOCKET 1, SCM_RIGHTS 1, the descriptor; the kernel pads to 24. */
    if (size >= 20 && size <= 24 && little_endian(data, 8) == 20 && little_endian(data + 8, 4) == 1 &&
        little_endian(data + 12, 4) == 1)
        expect(fd == (int)little_endian(data + 16, 4));
    else
        expect(fd == -1);
    free(copy);
}
