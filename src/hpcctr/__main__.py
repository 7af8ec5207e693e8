"""Entry of the program. ``run`` and ``exec`` through an engine, and ``slurm-task``, take a short lane that imports next
to nothing.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> NoReturn:
    """Run the command line of this process; the exit status is the command's own where it became the process."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["slurm-task"] or (arguments[:1] in (["run"], ["exec"]) and os.getuid() != 0):
        _isolate()
        _take_short_lane(arguments[0], arguments[1:])
    from hpcctr.cli.app import run_command_line

    raise SystemExit(run_command_line())


def _take_short_lane(verb: str, arguments: list[str]) -> None:
    """The short lane; returns when the full command answers better."""
    from hpcctr.errors import HpcctrError, ImageNotInStore
    from hpcctr.request import ExecWords, NeedsFullParser, RunWords

    try:
        if verb == "slurm-task":
            from hpcctr.client.slurm import run as run_task

            run_task(arguments)
        if verb == "exec":
            from hpcctr.client.exec import join

            join(ExecWords.parse(arguments))
        words = RunWords.parse(arguments)
        if words.explain or words.pull == "always":
            return
        words = words.settled()
        from hpcctr.client.run import run

        try:
            run(words)
        except ImageNotInStore as error:
            if words.pull == "never":
                raise
            missing = error
        from hpcctr.cli.bringing import bring_for

        bring_for(words, missing)
        run(words)
    except NeedsFullParser:
        return
    except HpcctrError as error:
        error.tell()
        raise SystemExit(error.exit_status) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _isolate() -> None:
    """Start again with ``-IS`` when PYTHONPATH, the user's site-packages or the working directory could change what is
    imported.

    The launcher that ``hpcctr engine install`` writes starts isolated and never comes here.
    """
    if sys.flags.isolated:
        return
    place = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from hpcctr.__main__ import main; main()"
    from hpcctr.client.environment import of_this_process

    os.execve(  # noqa: S606
        sys.executable, [sys.executable, "-IS", "-c", code, place, *sys.argv[1:]], of_this_process()
    )


if __name__ == "__main__":
    main()
