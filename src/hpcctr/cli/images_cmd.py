"""``hpcctr pull|images|inspect|rm``: the store's commands."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Protocol

import msgspec
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from hpcctr.cli.table import Format, print_rows, printable, size
from hpcctr.image import platform as platforms
from hpcctr.image.record import Platform
from hpcctr.image.reference import ImageRef
from hpcctr.image.store import Store
from hpcctr.site import Site

if TYPE_CHECKING:
    from hpcctr.image.pull import Progress as PullProgress

FormatOption = Annotated[Format, typer.Option("--format", help="How to print.")]
PlatformOption = Annotated[
    str | None, typer.Option("--platform", metavar="PLATFORM", help="OS/ARCH[/VARIANT]; default: this node's.")
]
_STAGES = {"download": "downloading", "read": "reading layers", "write": "writing image"}


def pull(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...",
            help="[docker://]NAME[:TAG][@DIGEST], oci-archive:FILE[:REF], docker-archive:FILE, or oci:DIR[:REF].",
        ),
    ],
    platform: PlatformOption = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Name it has in the store.")] = None,
) -> None:
    """Bring images into the store: downloaded, verified, and written as one read-only file each.

    The name to run an image by is printed at the end.
    """
    for image in images:
        typer.echo(pull_one(image, platform=platform or "", name=name))


def pull_one(text: str, *, platform: str = "", name: str | None = None) -> str:
    """Pull one image, showing progress on stderr; the name to run it by."""
    # The registry client behind this costs a second of imports: only a pull pays for it.
    from hpcctr.image.pull import pull as pull_image

    ref = ImageRef.parse(text)
    with _shown(text) as shown:
        result = pull_image(
            ref,
            site=Site.of_this_process(),
            platform=platforms.parse(platform) if platform else None,
            name=name,
            progress=shown.update,
        )
    record = result.image.record
    state = "up to date" if result.was_stored else f"pulled, {size(record.file_size)}"
    _say(f"{ImageRef.parse(result.name).familiar}: {state}, {record.digest}")
    return ImageRef.parse(result.name).familiar


def images(format: FormatOption = Format.TABLE) -> None:  # noqa: A002
    """List the images of the store."""
    rows: list[dict[str, object]] = []
    for stored in Store.open(Site.of_this_process().store).images():
        record = stored.image.record if stored.image is not None else None
        rows.append(
            {
                "name": ImageRef.parse(stored.name).familiar,
                "platform": str(stored.platform),
                "digest": stored.digest,
                "short_digest": stored.digest[:19],
                "since": stored.since,
                "file_size": record.file_size if record else None,
                "size": size(record.file_size) if record else "missing",
            }
        )
    print_rows(rows, ("name", "platform", "short_digest", "size", "since"), format)


def inspect(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A name or digest as hpcctr images prints it.")],
    platform: PlatformOption = None,
    format: FormatOption = Format.TABLE,  # noqa: A002
) -> None:
    """Show what the store knows of an image: its config, where it came from, what conversion changed."""
    stored = Store.open(Site.of_this_process().store).find(image, _platform(platform))
    facts = {"name": stored.name, **msgspec.to_builtins(stored.record), "path": stored.path}
    for key in ("passwd", "group"):
        facts.pop(key, None)
    if format is Format.JSON:
        typer.echo(json.dumps(facts, indent=2))
        return
    for key, value in _flat(facts):
        typer.echo(f"{key:22} {printable(str(value))}")


def rm(
    names: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Names or digests as hpcctr images prints them.")
    ],
    platform: PlatformOption = None,
) -> None:
    """Remove names from the store, and images that no name means any more. Running programs keep their image."""
    from hpcctr.image.publish import remove

    store = Store.open(Site.of_this_process().store, writable=True)
    for name in names:
        removed = remove(store, name, _platform(platform))
        for gone in (*removed.names, *removed.digests):
            typer.echo(f"removed {gone}")
        _say(f"{size(removed.freed)} freed")


def _platform(text: str | None) -> Platform | None:
    return platforms.parse(text) if text else None


def _flat(facts: dict[str, object], prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for key, value in facts.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            rows += [(f"{prefix}{key}", entry) for entry in value]
        elif isinstance(value, int) and key.endswith("_size"):
            rows.append((f"{prefix}{key}", f"{value} ({size(value)})"))
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


def _say(text: str) -> None:
    """A line for people, beside the result on stdout."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


class _Shown(Protocol):
    def update(self, progress: PullProgress) -> None: ...


def _shown(text: str) -> AbstractContextManager[_Shown]:
    """A bar for each stage on a terminal, a line for each stage elsewhere."""
    return _Bars(text) if sys.stderr.isatty() else nullcontext(_Lines(text))


class _Lines:
    def __init__(self, text: str) -> None:
        self._text = text
        self._stage = ""

    def update(self, progress: PullProgress) -> None:
        if progress.stage != self._stage:
            self._stage = progress.stage
            total = f" of {size(progress.total)}" if progress.total else ""
            _say(f"{self._text}: {_STAGES[progress.stage]}{total}")


class _Bars:
    def __init__(self, text: str) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._text = text
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, progress: PullProgress) -> None:
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._progress.add_task(_STAGES[progress.stage])
        self._progress.update(self._tasks[progress.stage], completed=progress.done, total=progress.total)
