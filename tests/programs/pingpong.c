/* Latency and bandwidth between ranks 0 and 1, and what MPI_Init took.
 *
 *   init_ms=51.2 latency_us=0.31 bandwidth_mb_s=9123.4
 *
 * latency is half the round trip of 8 bytes, bandwidth that of 4 MiB in 10^6 bytes a second; each the median of batches.
 */
#define _POSIX_C_SOURCE 200809L
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { BATCHES = 21, LARGE = 4 << 20 };

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Median time of one way, in seconds. */
static double one_way(int rank, char *buffer, int bytes, int rounds)
{
    double times[BATCHES];
    for (int batch = 0; batch < BATCHES; batch++) {
        MPI_Barrier(MPI_COMM_WORLD);
        double start = now();
        for (int i = 0; i < rounds; i++) {
            if (rank == 0) {
                MPI_Send(buffer, bytes, MPI_BYTE, 1, 0, MPI_COMM_WORLD);
                MPI_Recv(buffer, bytes, MPI_BYTE, 1, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
            } else if (rank == 1) {
                MPI_Recv(buffer, bytes, MPI_BYTE, 0, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
                MPI_Send(buffer, bytes, MPI_BYTE, 0, 0, MPI_COMM_WORLD);
            }
        }
        times[batch] = (now() - start) / (2.0 * rounds);
    }
    qsort(times, BATCHES, sizeof times[0], ascending);
    return times[BATCHES / 2];
}

int main(int argc, char **argv)
{
    int rank, size;
    double start = now();
    MPI_Init(&argc, &argv);
    double init = now() - start;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (size < 2) {
        fprintf(stderr, "pingpong needs two ranks\n");
        MPI_Abort(MPI_COMM_WORLD, 2);
    }
    char *buffer = malloc(LARGE);
    if (buffer == NULL)
        MPI_Abort(MPI_COMM_WORLD, 3);
    memset(buffer, rank, LARGE);
    one_way(rank, buffer, 8, 200);
    double small = one_way(rank, buffer, 8, 1000);
    one_way(rank, buffer, LARGE, 1);
    double large = one_way(rank, buffer, LARGE, 4);
    if (rank == 0)
        printf("init_ms=%.2f latency_us=%.3f bandwidth_mb_s=%.1f\n", init * 1e3, small * 1e6, LARGE / large / 1e6);
    free(buffer);
    MPI_Finalize();
    return 0;
}
