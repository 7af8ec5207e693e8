/* A parent that starts two children by MPI_Comm_spawn, and the children; one line each.
 *
 *   spawn COMMAND [WORD...]    role=parent root=WHERE children=2 sum=3
 *   started by MPI             role=child root=WHERE rank=0
 *
 * The command of the children is given, so that it may be spawn itself or a launcher with spawn among its words. WHERE is
 * "container" or "host".
 */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static const char *root(void)
{
    return access("/.hpcctr-anchor", F_OK) == 0 ? "container" : "host";
}

int main(int argc, char **argv)
{
    MPI_Comm parent, all, other;
    int rank, children = 2, sum = 0, mine;
    char line[256];

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_get_parent(&parent);
    if (parent == MPI_COMM_NULL) {
        if (argc < 2)
            MPI_Abort(MPI_COMM_WORLD, 2);
        MPI_Comm_spawn(argv[1], argv + 2, children, MPI_INFO_NULL, 0, MPI_COMM_SELF, &other, MPI_ERRCODES_IGNORE);
    } else {
        other = parent;
    }
    MPI_Intercomm_merge(other, parent != MPI_COMM_NULL, &all);
    mine = parent == MPI_COMM_NULL ? 0 : rank + 1;
    MPI_Allreduce(&mine, &sum, 1, MPI_INT, MPI_SUM, all);
    int written = parent == MPI_COMM_NULL
                      ? snprintf(line, sizeof line, "role=parent root=%s children=%d sum=%d\n", root(), children, sum)
                      : snprintf(line, sizeof line, "role=child root=%s rank=%d\n", root(), rank);
    /* One write for the whole line: the processes share the descriptor and their lines must not mix. */
    if (write(STDOUT_FILENO, line, (size_t)written) != written)
        return 1;
    MPI_Comm_free(&all);
    MPI_Comm_disconnect(&other);
    MPI_Finalize();
    return 0;
}
