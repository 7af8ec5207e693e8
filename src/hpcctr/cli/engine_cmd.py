"""``hpcctr engine serve|check|install``: the administrator's commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from hpcctr.errors import EnterUnusable
from hpcctr.site import DEFAULT_PATH, Site

app = typer.Typer(no_args_is_help=True, help="Run and set up the node's engine (root).")
SiteFile = Annotated[
    str | None, typer.Option("--site", metavar="FILE", help=f"Site file; default: {DEFAULT_PATH} if it exists.")
]


@app.command()
def serve(site: SiteFile = None) -> None:
    """Run the engine in the foreground: build containers for the node's users until SIGTERM.

    Under systemd's socket activation it takes the socket it is given.
    """
    from hpcctr.engine.serve import serve as serve_engine

    raise SystemExit(serve_engine(Site.load(site, root_owned=True)))


@app.command()
def check(
    file: Annotated[str | None, typer.Argument(metavar="[FILE]", help="A site file; default: the node's.")] = None,
) -> None:
    """Read a site file and its policy as the engine would, and say what is wrong."""
    from hpcctr.policy.load import load

    site = Site.load(file, root_owned=True)
    rules = load(site.policy_directory)
    for rule in rules:
        typer.echo(f"{rule.action:5} users={','.join(rule.users)} images={','.join(rule.images)}  ({rule.label})")
    typer.echo(f"{file or DEFAULT_PATH}: {len(rules)} rules, otherwise deny")


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
