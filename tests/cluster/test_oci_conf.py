"""`srun --container=IMAGE` by Slurm's own OCI support, with the oci.conf and task-prolog of etc/slurm."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.site_files import (
    FIRST,
    SECOND,
    SPOOL,
    cluster_of_a_site,
    container,
    hide,
    hide_engine,
    install,
    known,
    oci_conf,
    show_engine,
    takes_names,
)
from tests.support.host import Host
from tests.support.mpi import contained, reports, require_one_job
from tests.support.polling import wait_until
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.network, pytest.mark.timeout(180, func_only=True)]


@pytest.fixture(scope="module")
def site() -> Iterator[Cluster]:
    with cluster_of_a_site("oci") as made:
        yield made


@pytest.fixture(scope="module")
def image(site: Cluster, busybox_image: str) -> str:
    return known(site, busybox_image)


@pytest.fixture(scope="module")
def mpi_image(site: Cluster, debian12_mpi_image: str) -> str:
    return known(site, debian12_mpi_image)


@pytest.fixture
def open_place(place: Path) -> Path:
    """A directory in which everybody may make files."""
    place.chmod(0o1777)
    return place


def contained_step(
    site: Cluster, image: str, *words: str, flags: tuple[str, ...] = (f"--nodelist={FIRST}",), **options: Any
) -> subprocess.CompletedProcess[bytes]:
    return site.srun("--ntasks=1", *flags, f"--container={container(site, image)}", *words, **options)


def test_a_step_is_what_it_is_when_hpcctr_run_starts_it(site: Cluster, image: str, alice: User) -> None:
    """Same user, groups, cgroups, limits, directory, system and variables; the task is slurmstepd's own child."""
    script = (
        "id; pwd; umask; ulimit -a; cat /proc/self/cgroup; ls /; ls -d /etc/apt; grep -E 'Cap|NoNew|Sig[BIC]|Cpus' "
        '/proc/self/status; echo $SLURM_PROCID $SLURM_NTASKS $SLURMD_NODENAME $HOME; echo "$ODD"; exec 2>&1; '
        "cat /proc/$PPID/comm"
    )
    environment = {"ODD": "two\nlines 'and' \"quotes\" $(id)", "PWD": str(alice.home)}
    flags = (f"--nodelist={FIRST}", "--ntasks=1")
    outside = site.srun(*flags, *site.inside(image, "sh", "-c", script), user=alice, env=environment)
    inside = contained_step(site, image, "sh", "-c", script, user=alice, env=environment)

    def lines(output: bytes) -> list[str]:
        """Without the numbers of job and step."""
        return [line if "/job_" not in line else line.partition("/job_")[0] for line in output.decode().splitlines()]

    assert lines(inside.stdout) == lines(outside.stdout)
    assert "slurmstepd" in lines(inside.stdout)
    assert environment["ODD"].encode() in inside.stdout


WORDS = [
    "plain", "it's", "'", "''", "' '", "','", "a b", " ", "", "two\nlines", "tab\t", "\\", "\\'", '"', "`id`", "$(id)",
    "$HOME", "${IFS}", "*", "?", "~", "# no", "a # b", "; exit", "& ", "|", ">", "<(x)", "%b", "%@", "%", "--", "-n1",
    "é", "!", "'\"'\"''",
]  # fmt: skip


def test_every_word_of_the_command_arrives_as_it_was_typed(site: Cluster, image: str, alice: User) -> None:
    done = contained_step(site, image, "printf", "[%s]\\n", *WORDS, user=alice)
    assert done.stdout.decode() == "".join(f"[{word}]\n" for word in WORDS)


@pytest.mark.parametrize(
    "word", ["$(touch {place}/made)", "'; touch {place}/made; '", "\ntouch {place}/made\n", "' # "]
)
def test_no_shell_obeys_a_word_of_the_command(
    site: Cluster, image: str, alice: User, open_place: Path, word: str
) -> None:
    word = word.format(place=open_place)
    done = contained_step(site, image, "printf", "%s", word, user=alice)
    site.wait_until_idle()
    assert done.stdout.decode() == word
    assert list(open_place.iterdir()) == []


NAMES = [
    "x; touch {place}/made", "$(touch {place}/made)", "`touch {place}/made`", "x\ntouch {place}/made\n",
    "x' touch {place}/made '", "x & touch {place}/made", "# x", "x # y", "-v", "--help", "--entrypoint=/bin/sh",
    "no/such:image", "/", "..", " ",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_no_shell_and_no_option_parser_obeys_the_name_of_the_container(
    site: Cluster, image: str, alice: User, open_place: Path, name: str
) -> None:
    """Slurm puts it into commands of its own unquoted, some of which it runs as root."""
    words = ["sh", "-c", "echo ran"]
    given = name.format(place=open_place)
    done = site.srun("--ntasks=1", f"--container={given}", *words, user=alice, check=False)
    site.wait_until_idle()
    assert done.returncode != 0 and b"ran" not in done.stdout
    assert list(open_place.iterdir()) == []


@pytest.mark.skipif("takes_names()", reason="this Slurm reads no config.json of a user's")
@pytest.mark.parametrize("name", NAMES)
def test_no_shell_obeys_what_a_users_own_bundle_says(
    site: Cluster, image: str, alice: User, open_place: Path, name: str
) -> None:
    given = name.format(place=open_place)
    (open_place / "bundle").mkdir()
    config = {"root": {"path": given}, "annotations": {"hpcctr.image": given}}
    (open_place / "bundle/config.json").write_text(json.dumps(config))
    done = site.srun(f"--container={open_place}/bundle", "sh", "-c", "echo ran", user=alice, check=False)
    site.wait_until_idle()
    assert done.returncode != 0 and b"ran" not in done.stdout
    assert [path.name for path in open_place.iterdir()] == ["bundle"]


def test_a_command_without_a_slash_is_looked_up_in_the_images_path(site: Cluster, image: str, alice: User) -> None:
    """Slurm has found it in /usr/bin of the host, which the image does not have."""
    assert site.srun("--ntasks=1", "sh", "-c", "command -v tail", user=alice).stdout == b"/usr/bin/tail\n"
    contained_step(site, image, "sh", "-c", "test ! -e /usr/bin/tail", user=alice)
    assert contained_step(site, image, "tail", "-n1", "/proc/self/comm", user=alice).stdout == b"tail\n"


def test_exit_status_and_fatal_signal_are_the_commands(site: Cluster, image: str, alice: User) -> None:
    assert contained_step(site, image, "sh", "-c", "exit 7", user=alice, check=False).returncode == 7
    # 128 and the signal, as for any step.
    assert contained_step(site, image, "sh", "-c", "kill -SEGV $$", user=alice, check=False).returncode == 139
    done = contained_step(site, image, "no-such-program", user=alice, check=127)
    assert b"error[command-not-found]: no-such-program" in done.stderr


@pytest.mark.parametrize("plugin", ["pmix", "pmi2"])
def test_tasks_form_one_mpi_job(site: Cluster, mpi_image: str, alice: User, plugin: str) -> None:
    program = contained("openmpi" if plugin == "pmix" else "mpich", "report")
    names = {FIRST, SECOND}
    # Before 23.02 Slurm has one task of a contained step on a node.
    ranks = len(names) * (2 if takes_names() else 1)
    flags = [f"--nodelist={','.join(sorted(names))}", f"--ntasks={ranks}", f"--mpi={plugin}"]
    step = site.srun(*flags, f"--container={container(site, mpi_image)}", program, user=alice)
    found = reports(step.stdout)
    require_one_job(found, ranks)
    assert {report.host for report in found} == names


@pytest.mark.skipif("takes_names()", reason="this Slurm can")
def test_more_tasks_on_a_node_than_slurm_can_are_refused(site: Cluster, image: str, alice: User) -> None:
    done = contained_step(site, image, "echo", "ran", flags=(f"--nodelist={FIRST}", "-n2"), user=alice, check=False)
    assert done.returncode != 0 and done.stdout == b""


def test_a_batch_script_runs_in_the_image(site: Cluster, image: str, alice: User) -> None:
    """Its own lines, that is; srun is not in the image."""
    text = "ls /usr/bin/tail; command -v srun; echo $SLURM_JOB_NAME; id -un; pwd"
    flags = [f"--container={container(site, image)}", "--job-name=contained"]
    job = site.sbatch(text, *flags, user=alice, env={"PWD": str(alice.home)})
    assert job.output.split()[-3:] == ["contained", alice.name, str(alice.home)]
    assert "/usr/bin/tail: No such file" in job.output and "/srun" not in job.output


def test_the_interactive_step_of_an_allocation_runs_in_the_image(site: Cluster, image: str, alice: User) -> None:
    """The shell that salloc starts when it is given no command."""
    typed = b"test -e /usr/bin/tail || echo in the image of job $SLURM_JOB_ID\n"
    allocation = ["salloc", "--quiet", "--ntasks=1", f"--container={container(site, image)}"]
    env = {**site.environment, "SHELL": "/bin/sh"}
    done = site.login.run(allocation, user=alice, env=env, input=typed)
    assert done.stdout.startswith(b"in the image of job "), done


def test_a_step_of_such_an_allocation_runs_in_the_image_when_it_is_given_it_itself(
    site: Cluster, image: str, alice: User
) -> None:
    """Slurm tells every step of it of the container, and puts none in it but the interactive one."""
    allocation = [f"--nodelist={FIRST}", "--ntasks=1", f"--container={container(site, image)}", "sh", "-c"]
    look = "sh -c 'test -e /usr/bin/tail && echo on the bare host || echo in the image'"
    refused = site.salloc(*allocation, f"srun --quiet {look}", user=alice, check=125)
    assert b"error[slurm-task]" in refused.stdout and b"the bare host\n" not in refused.stdout
    inside = site.salloc(*allocation, f'srun --quiet --container="$SLURM_CONTAINER" {look}', user=alice)
    outside = site.salloc(*allocation, f"env -u SLURM_CONTAINER srun --quiet {look}", user=alice)
    assert (inside.stdout, outside.stdout) == (b"in the image\n", b"on the bare host\n")


@pytest.mark.skipif("not takes_names()", reason="this Slurm cannot")
def test_components_of_a_heterogeneous_job_run_in_the_image(site: Cluster, image: str, alice: User) -> None:
    step = ["--ntasks=1", f"--container={container(site, image)}", "sh", "-c", "test ! -e /usr/bin/tail && hostname"]
    done = site.srun(f"--nodelist={FIRST}", *step, ":", f"--nodelist={SECOND}", *step, user=alice)
    assert sorted(done.stdout.split()) == [FIRST.encode(), SECOND.encode()]


def _step_after_loss(site: Cluster, image: str, alice: User, take: Callable[[Host], None]) -> str:
    """What a step with --container prints, and its status, when its node loses something after the job has begun."""
    host = site.nodes[FIRST].host
    step = f"srun --quiet --container='{container(site, image)}' sh -c 'echo ran on the bare host'"
    text = f"touch ready; until [ -e go ]; do sleep 0.1; done; {step}; echo status $?; rm ready go"
    number = site.submit(text, f"--nodelist={FIRST}", f"--chdir={alice.home}", user=alice)
    wait_until((alice.home / "ready").exists, seconds=30, what="the job's begin")
    take(host)
    (alice.home / "go").touch()
    os.chown(alice.home / "go", alice.uid, alice.gid)
    output = site.wait(number, user=alice).output
    assert "bare host" not in output
    return output


def test_without_hpcctr_on_the_node_the_step_fails(site: Cluster, image: str, alice: User) -> None:
    output = _step_after_loss(site, image, alice, hide)
    install(site.nodes[FIRST].host)
    assert "status 127" in output, output


def test_without_the_engine_the_step_fails(site: Cluster, image: str, alice: User) -> None:
    output = _step_after_loss(site, image, alice, hide_engine)
    show_engine(site.nodes[FIRST].host)
    assert "status 125" in output and "error[no-engine]" in output, output


def test_without_oci_conf_on_the_node_the_step_fails(site: Cluster, image: str, alice: User) -> None:
    """Slurm itself would run the command on the bare host ("in a purely advisory manner", oci.conf(5))."""
    kept = oci_conf(site).rename(oci_conf(site).with_suffix(".kept"))
    try:
        done = contained_step(site, image, "sh", "-c", "echo ran on the bare host", user=alice, check=125)
        assert b"bare host" not in done.stdout and b"has no oci.conf" in done.stdout + done.stderr
        assert site.srun("--ntasks=1", "echo", "no container asked for", user=alice).stdout != b""
    finally:
        kept.rename(oci_conf(site))


def test_steps_leave_nothing_in_slurms_spool(site: Cluster, image: str, alice: User) -> None:
    before = _spooled(site)
    contained_step(site, image, "true", user=alice)
    contained_step(site, image, "no-such-program", user=alice, check=127)
    site.wait_until_idle()
    assert _spooled(site) == before


def _spooled(site: Cluster) -> set[Path]:
    return {path for node in site.nodes.values() for path in node.host.path(SPOOL).glob("oci-*")}
