"""A real terminal: tmux with a server of its own, typed at and read like a person does.

with Terminal.start(host, user=alice, env=node.environment()) as terminal:
    terminal.type("echo $((6 * 7))")
    terminal.wait_for("42")
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.host import Host
from tests.support.polling import wait_until
from tests.support.users import User

PROMPT = "host>"


@dataclass(frozen=True, kw_only=True)
class Terminal:
    """One pane of 100x30 with an interactive bash of the host, whose prompt is :data:`PROMPT`."""

    host: Host
    user: User | None
    socket: Path
    environment: Mapping[str, str]

    @classmethod
    @contextlib.contextmanager
    def start(cls, host: Host, *, user: User | None, env: Mapping[str, str]) -> Iterator[Terminal]:
        home = Path("/root") if user is None else user.home
        # Names of sockets have at most 107 bytes (unix(7)).
        socket = home / f".tmux-{secrets.token_hex(4)}"
        terminal = cls(host=host, user=user, socket=socket, environment={**env, "PS1": f"{PROMPT} ", "TERM": "xterm"})
        try:
            terminal._tmux("-f/dev/null", "new-session", "-d", "-x100", "-y30", "bash --norc --noprofile -i")
            terminal._tmux("set-option", "-g", "status", "off")
            terminal._tmux("resize-window", "-x100", "-y30")
            terminal.wait_for(PROMPT)
            yield terminal
        finally:
            with contextlib.suppress(AssertionError):
                terminal._tmux("kill-server")
            socket.unlink(missing_ok=True)

    def _tmux(self, *words: str) -> str:
        argv = ["tmux", "-S", str(self.socket), *words]
        return self.host.run(argv, user=self.user, env=self.environment).stdout.decode(errors="replace")

    def type(self, text: str, *, enter: bool = True) -> None:
        """Type characters, and Return after them."""
        self._tmux("send-keys", "-l", "--", text)
        if enter:
            self.press("Enter")

    def press(self, *keys: str) -> None:
        """Press keys by tmux's names: C-c, C-z, Escape, Enter."""
        self._tmux("send-keys", *keys)

    def screen(self) -> str:
        """What is on the screen now, without what has scrolled away; long lines in one."""
        return self._tmux("capture-pane", "-p", "-J")

    def resize(self, columns: int, rows: int) -> None:
        self._tmux("resize-window", f"-x{columns}", f"-y{rows}")

    def clear(self) -> None:
        """Clear the screen and what has scrolled away, as the terminal, unseen by the program."""
        self._tmux("send-keys", "-R")
        self._tmux("clear-history")

    def wait_for(self, pattern: str, *, seconds: float = 20) -> re.Match[str]:
        """Wait until a regular expression (lines of their own: ^ and $) is found on the screen."""
        found: list[re.Match[str]] = []

        def is_there() -> bool:
            match = re.search(pattern, self.screen(), re.MULTILINE)
            found.extend([match] if match else [])
            return match is not None

        wait_until(is_there, seconds=seconds, what=lambda: f"{pattern!r} on the screen:\n{self.screen()}")
        return found[-1]

    def says(self, command: str) -> str:
        """Run a command at the prompt of whatever shell is there, and what it printed."""
        mark = secrets.token_hex(4)
        self.clear()
        self.type(f"{command}; echo {mark[:4]}'{mark[4:]}'")
        found = self.wait_for(rf"(?s){mark[:4]}'{mark[4:]}'\n(.*?){mark}$")
        return found[1].strip("\n")
