"""The very files of etc/slurm in the cluster, hpcctr installed where they say."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.cluster import Cluster, cluster
from tests.support.engine import HPCCTR
from tests.support.host import Host
from tests.support.leftovers import require_nothing_new
from tests.support.scratch import scratch

FILES = Path(__file__).parents[2] / "etc/slurm"
INSTALLED = Path("/opt/hpcctr/bin")
"""Where the files say that hpcctr is; inside a Host it is the one under test."""
SPOOL = Path("/run/slurmd")
FIRST, SECOND = "s1", "s2"


def shipped(root: Path) -> Path:
    """A copy of the files where all nodes of the cluster below ROOT see it: a checkout in /tmp they do not see."""
    copy = root / "shipped"
    if not copy.exists():
        shutil.copytree(FILES, copy)
        for path in (copy, *copy.rglob("*")):
            # Whatever the umask of the checkout.
            path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
    return copy


def takes_names() -> bool:
    """Whether Slurm's --container takes anything: since 23.02. Before, it wants a directory with a config.json."""
    printed = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\d+)\.(\d+)", printed)
    assert found is not None, printed
    return (int(found[1]), int(found[2])) >= (23, 2)


def install(host: Host) -> None:
    """Show hpcctr at its path. The directory is the machine's, what is mounted on it is the host's; it stays."""
    INSTALLED.mkdir(mode=0o755, exist_ok=True)
    host.run(["mount", "--bind", str(HPCCTR.parent), str(INSTALLED)])


def hide(host: Host) -> None:
    """Take it away: a node without hpcctr."""
    host.run(["umount", "--lazy", str(INSTALLED)])


def hide_engine(host: Host) -> None:
    """A node whose engine does not answer; the processes in its containers go on."""
    host.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run/hpcctr"])


def show_engine(host: Host) -> None:
    """The end of that."""
    # Lazily: an epilog may be at work there.
    host.run(["umount", "--lazy", "/run/hpcctr"])


def oci_conf(made: Cluster) -> Path:
    """Where Slurm looks for it."""
    return made.root / "slurm/oci.conf"


def bundles(made: Cluster) -> Path:
    """What an older Slurm is told of the images; all nodes see it."""
    return made.root / "bundles"


def container(made: Cluster, image: str) -> str:
    """What --container= is given for an image."""
    return image if takes_names() else str(bundles(made) / image)


@contextlib.contextmanager
def cluster_of_a_site(name: str) -> Iterator[Cluster]:
    """Two nodes, s1 and s2, with every file of etc/slurm where docs/slurm.md puts it.

    The spool directory has one path on all nodes and is each node's own. The linger is longer than any test: what goes
    at once, goes by the epilog.
    """
    scripts = (("Prolog", "prolog"), ("Epilog", "epilog"), ("TaskProlog", "task-prolog"))
    with (
        scratch(name) as root,
        cluster(
            root,
            nodes=2,
            prefix="s",
            conf="".join(f"{key}={shipped(root) / file}\n" for key, file in scripts)
            + f"SlurmdSpoolDir={SPOOL}\nLaunchParameters=use_interactive_step\n",
            files={"oci.conf": (FILES / ("oci.conf" if takes_names() else "oci-22.05.conf")).read_text()},
            carry=[str(SPOOL)],
            linger_seconds=3600,
        ) as made,
    ):
        for node in made.nodes.values():
            install(node.host)
        before = made.leftovers()
        yield made
        made.wait_until_idle()
        require_nothing_new(before)


def known(made: Cluster, image: str) -> str:
    """Pull an image, tell an older Slurm of it, and return its name in the store."""
    made.pull(image)
    if not takes_names():
        made.login.run([str(shipped(made.root) / "make-bundles"), str(bundles(made))], env=made.environment)
    node = made.nodes[FIRST]
    rows = json.loads(node.hpcctr("images", "--format", "json").stdout)
    # The archive or directory it was pulled from has the name before the dot, or all of it.
    stem = Path(image.partition(":")[2]).name.partition(".")[0].partition(":")[0]
    (name,) = [str(row["name"]) for row in rows if stem in row["name"]]
    return name
