"""``hpcctr share|promote``: an image of a user's own for others, and for everybody."""

from __future__ import annotations

import grp
import os
import pwd
from typing import Annotated

import typer

from hpcctr.cli import errands, shared_images
from hpcctr.cli.progress import say
from hpcctr.cli.table import Format, print_rows
from hpcctr.errand import Errand, Granted
from hpcctr.errors import ImageNotYours, UsageWrong
from hpcctr.image import platform as platforms
from hpcctr.image.promotion import promote as promote_image
from hpcctr.image.reference import ImageRef
from hpcctr.site import Site


def share(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A name or digest as hpcctr images --mine prints it.")],
    user: Annotated[list[str] | None, typer.Option("--user", metavar="USER", help="A user's name or number.")] = None,
    group: Annotated[
        list[str] | None, typer.Option("--group", metavar="GROUP", help="A group's name or number.")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Share it no longer; running programs go on.")] = False,
    format: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.TABLE,  # noqa: A002
) -> None:
    """Let users and groups run an image of your own; without options, list whom it is shared with.

    They name it @YOU/NAME. A name is shared with what it means now and later, not with what it meant before.
    """
    site = Site.of_this_process()
    grantees = [f"uid-{_uid(name)}" for name in user or ()] + [f"gid-{_gid(name)}" for name in group or ()]
    if remove and not grantees:
        raise UsageWrong("--remove needs whom", hint="hpcctr share IMAGE --remove --user NAME")
    if os.geteuid() == 0:
        raise ImageNotYours("root's images are the site's, and everybody's", hint="hpcctr promote @OWNER/NAME")
    mine = shared_images.own_name(image)
    task = "shares" if not grantees else "unshare" if remove else "share"
    errand = Errand(task=task, image=mine, grantees=",".join(grantees))  # type: ignore[arg-type]  # one of the three
    rows = [_row(said) for said in errands.run(errand, site) if isinstance(said, Granted)]
    print_rows(rows, ("name", "shared_with", "since"), format)
    if grantees and not remove:
        say(f"they run it as {shared_images.familiar(shared_images.owner_name(os.geteuid()), mine)}")


def promote(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="@OWNER/NAME[:TAG] or @OWNER/sha256:...")],
    name: Annotated[
        str | None,
        typer.Option("--as", metavar="NAME", help="The site's name for it; default: its own, of localhost/."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Though the name means another image now: the older stays in its history.")
    ] = False,
    platform: Annotated[
        str | None, typer.Option("--platform", metavar="PLATFORM", help="OS/ARCH[/VARIANT]; default: this node's.")
    ] = None,
) -> None:
    """Make an image of a user's one of the site's, for everybody. For root and the store's owner.

    The user keeps theirs. The file is verified, and not written again where the filesystem can link it.
    """
    site = Site.of_this_process()
    shared_images.require_administrator(site, f"promote {image}")
    part, its_name = shared_images.part_of(site, image)
    promoted = promote_image(
        site.store,
        part,
        its_name,
        owner=int(os.path.basename(part.path)),
        as_name=name,
        may_replace=replace,
        platform=platforms.parse(platform) if platform else None,
    )
    typer.echo(ImageRef.parse(promoted.name).familiar)
    say(f"{promoted.name}: {promoted.record.digest}, of {image}")


def _row(said: Granted) -> dict[str, object]:
    kind, _, number = said.grantee.partition("-")
    who = shared_images.owner_name(int(number)) if kind == "uid" else _group_name(int(number))
    name = said.image if said.image.startswith("sha256:") else ImageRef.parse(said.image).familiar
    return {
        "name": name,
        "kind": "user" if kind == "uid" else "group",
        "number": int(number),
        "who": who,
        "shared_with": f"{'user' if kind == 'uid' else 'group'} {who}",
        "since": said.since,
    }


def _uid(name: str) -> int:
    if name.isascii() and name.isdigit():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except (KeyError, ValueError):
        raise UsageWrong(f"--user {name}: there is no such user", hint=f"getent passwd {name}") from None


def _gid(name: str) -> int:
    if name.isascii() and name.isdigit():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        raise UsageWrong(f"--group {name}: there is no such group", hint=f"getent group {name}") from None


def _group_name(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
