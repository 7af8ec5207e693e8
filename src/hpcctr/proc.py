"""Text of /proc that users have a say in: names of processes, mount points and cgroups."""

from __future__ import annotations


def read_lines(path: str) -> list[str]:
    """The lines of a file of /proc, without their ends. Raises OSError as open and read do.

    They end with a line feed alone, which the kernel escapes in names or does not allow there. Every other character
    that ends a line for ``str.splitlines()`` or in Python's text mode may be part of a name.
    """
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return file.read().removesuffix("\n").split("\n")
