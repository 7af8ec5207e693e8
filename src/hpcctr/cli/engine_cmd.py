"""``hpcctr engine serve|check|install``: the administrator's commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from hpcctr.cli.table import Format
from hpcctr.errors import EnterUnusable, UsageWrong
from hpcctr.site import DEFAULT_PATH, Site

app = typer.Typer(no_args_is_help=True, help="Run and set up the node's engine (root).")
SiteFile = Annotated[
    str | None, typer.Option("--site", metavar="FILE", help=f"Site file; default: {DEFAULT_PATH} if it exists.")
]


FormatOption = Annotated[Format, typer.Option("--format", help="How to print.")]


@app.command()
def serve(site: SiteFile = None) -> None:
    """Run the engine in the foreground: build containers for the node's users until SIGTERM.

    Under systemd's socket activation it takes the socket it is given. SIGHUP: read the site file again.
    """
    from hpcctr.engine.serve import serve as serve_engine

    raise SystemExit(serve_engine(lambda: Site.load(site, root_owned=True)))


@app.command()
def check(
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE]", help="A site file, a policy file, or a directory of policy files; default: the node's."
        ),
    ] = None,
    user: Annotated[
        str | None, typer.Option("--as", metavar="USER", help="Tell what this user, by name or uid, may do.")
    ] = None,
    image: Annotated[
        str | None, typer.Option("--image", metavar="IMAGE", help="With --as: the image they launch.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --as: an image of the user's own.")] = False,
    group: Annotated[
        list[str] | None,
        typer.Option("--group", metavar="GROUP", help="With --as: a group they are in beside those of a login."),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option("--target", metavar="PATH", help="With --as: a mount target they ask for.")
    ] = None,
    feature: Annotated[
        list[str] | None, typer.Option("--feature", metavar="NAME", help="With --as: a host feature they ask for.")
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option("--device", metavar="NAME", help="With --as: a device they ask for.")
    ] = None,
    format: FormatOption = Format.TABLE,  # noqa: A002
) -> None:
    """Read a site file and its policy as the engine would, and say what is wrong.

    Prints the rules in the order in which they are asked; with --as and --image, what they decide instead.
    """
    from hpcctr.cli import engine_check

    checked = engine_check.read(file)
    if user is None and image is None:
        if private or group or target or feature or device:
            raise UsageWrong("nobody is named who asks for it", hint="hpcctr engine check --as USER --image IMAGE")
        engine_check.show(checked, format)
        return
    if user is None or image is None:
        raise UsageWrong("a decision is about a user and an image", hint="hpcctr engine check --as USER --image IMAGE")
    asked = engine_check.WhatIf(
        user=user,
        image=image,
        is_private=private,
        groups=tuple(group or ()),
        targets=tuple(target or ()),
        features=tuple(feature or ()),
        devices=tuple(device or ()),
    )
    raise SystemExit(engine_check.tell(checked, asked, format))


@app.command()
def install(site: SiteFile = None) -> None:
    """Install enter with its capabilities, and front, with which the hpcctr command starts. Root; may be repeated."""
    import hpcctr.client
    import hpcctr.enter
    from hpcctr.cli import launcher
    from hpcctr.enter.install import install_enter, install_front

    if os.getuid() != 0:
        raise EnterUnusable("only root can install enter", hint="sudo hpcctr engine install")
    settings = Site.load(site, root_owned=True)
    target, front = Path(settings.enter), Path(settings.front)
    built = _built(hpcctr.enter.__file__, "enter")
    built_front = _built(hpcctr.client.__file__, "front")
    script = Path(sys.argv[0]).resolve()
    is_ours = script.name == "hpcctr" and script.is_file()
    if is_ours:
        # Before anything is installed.
        launcher.first_line(str(front), sys.executable)
    os.umask(0o022)
    target.parent.mkdir(parents=True, exist_ok=True)
    install_enter(built, target)
    typer.echo(f"{target}: installed, root:root 0711, cap_sys_admin,cap_sys_chroot=p")
    install_front(built_front, front)
    typer.echo(f"{front}: installed, root:root 0755")
    if is_ours:
        launcher.write(script, front=str(front), python=sys.executable, packages=Path(__file__).parents[2])
        typer.echo(f"{script}: starts through front, isolated and without site")


def _built(package: str, name: str) -> Path:
    program = Path(package).with_name(name)
    if not program.exists():
        raise EnterUnusable(
            f"{program} has not been built", hint="pip install hpcctr, with a C compiler on this machine"
        )
    return program
