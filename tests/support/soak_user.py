"""One user of the soak: starts launches, so many at once, kills half of them, and tells how each ended.

Runs as that user by the system's Python and imports nothing but the standard library. One line of JSON on standard
input is the order; then a line on standard output for each launch. The end of standard input ends it early.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from typing import Any

#: Bytes of either output that are told.
_TOLD = 4000


class User:
    """The state of one run."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.lock = threading.Lock()
        self.following = 0
        self.is_over = threading.Event()
        #: Pids of programs that run for a while, to be joined by ``exec``.
        self.running: set[int] = set()

    def work(self) -> None:
        """Launches, one after the other, until all are done."""
        while not self.is_over.is_set():
            with self.lock:
                number = self.following
                self.following += 1
            if number >= self.order["launches"]:
                return
            told = json.dumps(self.launch(number))
            with self.lock:
                print(told, flush=True)

    def launch(self, number: int) -> dict[str, Any]:
        """One launch to its end. What it is, and after which part of the longest time it is killed, is the seed's."""
        dice = random.Random(f"{self.order['seed']}/{number}")
        kinds = self.order["kinds"]
        kind = dice.choices(list(kinds), list(kinds.values()))[0]
        word = f"{self.order['user']}.{number}"
        argv = self.words(kind, word, dice)
        kill_after = dice.random() * self.order["longest"] if dice.random() < self.order["killed"] else None
        begun = time.monotonic()
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if kind == "while":
            with self.lock:
                self.running.add(process.pid)
        is_killed = is_stuck = False
        out = err = b""
        try:
            out, err = process.communicate(timeout=kill_after if kill_after is not None else self.order["deadline"])
        except subprocess.TimeoutExpired:
            is_killed, is_stuck = kill_after is not None, kill_after is None
            process.kill()
            try:
                out, err = process.communicate(timeout=self.order["deadline"])
            except subprocess.TimeoutExpired:
                is_stuck = True
        with self.lock:
            self.running.discard(process.pid)
        return {
            "kind": kind,
            "argv": argv,
            "word": word,
            "status": process.returncode,
            "out": out[-_TOLD:].decode(errors="replace"),
            "err": err[-_TOLD:].decode(errors="replace"),
            "killed": is_killed,
            "stuck": is_stuck,
            "seconds": time.monotonic() - begun,
        }

    def words(self, kind: str, word: str, dice: random.Random) -> list[str]:
        """The command line of a launch."""
        hpcctr, image = self.order["hpcctr"], dice.choice(self.order["images"])
        if kind == "run":
            return [hpcctr, "run", image, "--", "echo", word]
        if kind == "target":
            return [hpcctr, "run", "-v", f"/var:/t{dice.randrange(12)}", image, "--", "echo", word]
        if kind == "while":
            script = f"sleep {dice.uniform(0.1, 0.8):.2f}; echo {word}"
            return [hpcctr, "run", image, "--", "sh", "-c", script]
        if kind == "exec":
            with self.lock:
                pids = sorted(self.running)
            return [hpcctr, "exec", str(dice.choice(pids) if pids else 1), "--", "echo", word]
        if kind == "pull":
            return [hpcctr, "pull", dice.choice(self.order["registry"])]
        if kind == "import":
            return [hpcctr, "pull", "--name", f"localhost/own{dice.randrange(3)}:1", self.order["archive"]]
        return [hpcctr, "images", "--mine"]


def main() -> None:
    """Follow the order."""
    user = User(json.loads(sys.stdin.readline()))
    threads = [threading.Thread(target=user.work) for _ in range(user.order["at_once"])]
    for thread in threads:
        thread.start()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        user.is_over.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
