"""The parent of root's command: signals go where they would go if there were no parent, and job control works.

The terminal signals the whole foreground group, so the command has those signals already; what somebody sends to this
process alone is meant for the command. When the command stops, this process stops as well, if a shell is there to see
it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from dataclasses import dataclass
from typing import Self

#: si_code of a signal that the kernel made, as the terminal's are (include/uapi/asm-generic/siginfo.h).
_SI_KERNEL = 0x80
_SENT_ON = frozenset(
    {
        signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT,
        signal.SIGWINCH, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU,
    }
)  # fmt: skip
_HANDLED = _SENT_ON | {signal.SIGCHLD}


@dataclass(frozen=True, kw_only=True, eq=False)
class Parent:
    """This process as the parent of one command."""

    child: int
    #: What was blocked before.
    mask: frozenset[int]
    attending: threading.Thread

    @classmethod
    def of_child(cls, child: int) -> Self:
        """Attend to a child that has been forked a moment ago. Call it before other threads start."""
        # Ignored, it would have the kernel reap the child and tell nobody (wait(2)). The child keeps what it has.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        mask = frozenset(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)))
        attending = threading.Thread(target=_attend, args=(child,), name="parent", daemon=True)
        attending.start()
        return cls(child=child, mask=mask, attending=attending)

    def wait(self) -> int:
        """Until the child has ended; its wait status."""
        self.attending.join()
        return os.waitpid(self.child, 0)[1]

    def end_like_child(self, status: int) -> int:
        """The exit status, or death by the same signal, so that our parent sees the same."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)
        if not os.WIFSIGNALED(status):
            return os.WEXITSTATUS(status)
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        import resource

        # The command's core is the one of interest, not ours.
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        os.kill(os.getpid(), number)
        return 128 + number


def _attend(child: int) -> None:
    """Until the child has ended. It is not reaped here: its number stays its own while others look at it."""
    is_job = _is_job_of_a_shell()
    while True:
        news = os.waitid(os.P_PID, child, os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
        if news is not None and news.si_code != os.CLD_STOPPED:
            return
        if news is not None:
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, child, os.WSTOPPED | os.WNOHANG)
            if is_job:
                _stop_by(news.si_status)
            continue
        received = signal.sigwaitinfo(_HANDLED)
        if received.si_signo in _SENT_ON and received.si_code != _SI_KERNEL:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, received.si_signo)


def _is_job_of_a_shell() -> bool:
    """Whether a shell with job control started this process: at a terminal, in a process group of the job's own.

    Nobody else waits for a stop, and who continues the command then, by its pid, would leave this process stopped.
    """
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
        return os.getpgrp() != os.getpgid(os.getppid())
    except OSError:
        return False


def _stop_by(number: int) -> None:
    """Stop this process by the signal that stopped the child, until somebody continues it.

    The signal that continues stays pending in this thread's mask and is sent on: a child in a process group of its own,
    as an interactive shell is, gets it from nobody else.
    """
    if number == signal.SIGSTOP:
        os.kill(os.getpid(), signal.SIGSTOP)
        return
    # The terminal's own may be pending here: one stop needs one signal.
    signal.sigtimedwait({number}, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    signal.raise_signal(number)
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
