/*
 * front: notes what the caller's process is before Python starts and changes it, then becomes Python.
 *
 * Python ignores SIGPIPE and SIGXFSZ at its start and keeps no record of what they were; the parent death signal can be
 * asked for with prctl(2) only, which its standard library does not have. The command is to get all three as they were.
 *
 * The kernel starts front for a script that begins with "#!FRONT PYTHON" (execve(2)):
 *
 *   argv = FRONT PYTHON SCRIPT ARG...    becomes    PYTHON -ISXhpcctr-caller=IGNORED:PDEATHSIG SCRIPT ARG...
 *
 * -I: the caller's PYTHON* variables and directories decide nothing. -S: no site. IGNORED: 1 for SIGPIPE and 2 for
 * SIGXFSZ, added up. client/enter.py reads the word. Nothing else is touched: no variable, no descriptor, no signal.
 *
 * It needs and has no privilege. No libc, like enter: its start-up is time in every launch.
 */
#include "../enter/report.h"

enum { SIGPIPE_IGNORED = 1, SIGXFSZ_IGNORED = 2 };

static bool is_ignored(int number)
{
    /* The kernel's struct sigaction; the handler comes first, and SIG_IGN is 1. */
    uintptr_t action[4] = {0, 0, 0, 0};

    return sys4(__NR_rt_sigaction, number, 0, POINTER(action), 8) == 0 && action[0] == 1;
}

static const char *python_options(void)
{
    static char word[64] = "-ISXhpcctr-caller=";
    size_t at = length_of(word);
    int pdeathsig = 0;

    word[at++] = (char)('0' + (is_ignored(SIGPIPE) ? SIGPIPE_IGNORED : 0) + (is_ignored(SIGXFSZ) ? SIGXFSZ_IGNORED : 0));
    word[at++] = ':';
    sys5(__NR_prctl, PR_GET_PDEATHSIG, POINTER(&pdeathsig), 0, 0, 0);
    for (const char *digit = decimal((unsigned long)pdeathsig); *digit != '\0'; digit++)
        word[at++] = *digit;
    return word;
}

/* The start in sys.h calls it by this name. */
_Noreturn void enter_main(uintptr_t *stack);

__attribute__((used)) _Noreturn void enter_main(uintptr_t *stack)
{
    long argc = (long)stack[0];
    const char **argv = (const char **)(stack + 1);
    long error;

    may_write_errors = sys2(__NR_fcntl, 2, F_GETFD) >= 0;
    if (argc < 3)
        die(FAILED, "launcher", "hpcctr-front", "the kernel starts it for the script hpcctr, nothing else has to",
            "hpcctr run IMAGE -- CMD");
    /* In place: as many words as before. */
    argv[0] = argv[1];
    argv[1] = python_options();
    error = sys3(__NR_execve, POINTER(argv[0]), POINTER(argv), POINTER(argv + argc + 1));
    die_of(FAILED, "launcher", argv[0], error, "an administrator runs hpcctr engine install with the Python of hpcctr");
}
