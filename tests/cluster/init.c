/* When MPI_Init had ended on each rank, in nanoseconds of CLOCK_MONOTONIC, which all nodes of the machine share:
 *
 *   initialised 1234567890123 of 8
 */
#define _POSIX_C_SOURCE 200809L
#include <mpi.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct timespec t;
    int size;
    MPI_Init(&argc, &argv);
    clock_gettime(CLOCK_MONOTONIC, &t);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    char line[80];
    int written = snprintf(line, sizeof line, "initialised %lld of %d\n", t.tv_sec * 1000000000LL + t.tv_nsec, size);
    /* One write for the whole line: ranks share the descriptor and their lines must not mix. */
    if (write(STDOUT_FILENO, line, (size_t)written) != written)
        return 1;
    MPI_Finalize();
    return 0;
}
