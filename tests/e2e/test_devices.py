"""Devices and host features as users ask for them: --gpu, --device, --feature.

/dev/fuse and /dev/kvm are real drivers, asked by ioctl. GPUs are stand-ins: the nodes are of the kernel's memory
driver, the libraries are made here, and the CDI file has the shape that nvidia-ctk writes. No GPU was run.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.node import Node, node
from tests.support.oci import busybox, write_layout
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

IMAGE = "local/small:1"
ZERO, RANDOM, FULL = (1, 5), (1, 8), (1, 7)


def _cdi(place: Path, name: str, document: object) -> None:
    (place / "cdi" / name).write_text(json.dumps(document))


def _device_nodes(directory: Path) -> list[dict[str, object]]:
    return [{"path": str(directory / "nvidiactl"), "type": "c", "major": FULL[0], "minor": FULL[1]}]


@pytest.fixture(scope="module")
def gpu_nodes() -> Iterator[Path]:
    """Two GPUs that are none, and their control node, by the names that NVIDIA's driver has for them."""
    directory, made = Path("/dev"), []
    if (directory / "nvidiactl").exists():
        pytest.skip("this machine has a driver of NVIDIA's, whose nodes these would be")
    try:
        for name, number in (("nvidia0", ZERO), ("nvidia1", RANDOM), ("nvidiactl", FULL)):
            made.append(directory / name)
            os.mknod(made[-1], stat.S_IFCHR | 0o666, os.makedev(*number))
            made[-1].chmod(0o666)
        yield directory
    finally:
        for path in made:
            path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def equipped(gpu_nodes: Path) -> Iterator[Node]:
    """A node whose site describes two GPUs, /dev/fuse and /dev/kvm."""
    with scratch("devices") as place:
        (place / "cdi").mkdir(mode=0o755)
        (place / "drivers").mkdir(mode=0o755)
        for name in ("libcuda.so.550.54.15", "libnvidia-ml.so.550.54.15"):
            (place / "drivers" / name).write_text(f"stands in for {name}\n")
        _cdi(
            place,
            "nvidia.json",
            {
                "cdiVersion": "0.5.0",
                "kind": "nvidia.com/gpu",
                "devices": [
                    *(
                        {"name": str(n), "containerEdits": {"deviceNodes": [{"path": str(gpu_nodes / f"nvidia{n}")}]}}
                        for n in range(2)
                    ),
                    {
                        "name": "all",
                        "containerEdits": {"deviceNodes": [{"path": str(gpu_nodes / f"nvidia{n}")} for n in range(2)]},
                    },
                ],
                "containerEdits": {
                    "env": ["NVIDIA_VISIBLE_DEVICES=void"],
                    "deviceNodes": _device_nodes(gpu_nodes),
                    "mounts": [
                        {
                            "hostPath": str(place / "drivers" / name),
                            "containerPath": f"/usr/lib/x86_64-linux-gnu/{name}",
                            "options": ["ro", "nosuid", "nodev", "rbind", "rprivate"],
                        }
                        for name in ("libcuda.so.550.54.15", "libnvidia-ml.so.550.54.15")
                    ],
                    "hooks": [
                        {
                            "hookName": "createContainer",
                            "path": "/usr/bin/nvidia-cdi-hook",
                            "args": [
                                "nvidia-cdi-hook",
                                "create-symlinks",
                                "--link",
                                "libcuda.so.550.54.15::/usr/lib/x86_64-linux-gnu/libcuda.so.1",
                            ],
                            "env": ["NVIDIA_CTK_DEBUG=false"],
                        },
                        {
                            "hookName": "createContainer",
                            "path": "/usr/bin/nvidia-cdi-hook",
                            "args": ["nvidia-cdi-hook", "disable-device-node-modification"],
                        },
                    ],
                },
            },
        )
        _cdi(
            place,
            "kernel.json",
            {
                "cdiVersion": "0.5.0",
                "kind": "kernel.org/misc",
                "devices": [
                    {"name": name, "containerEdits": {"deviceNodes": [{"path": f"/dev/{name}"}]}}
                    for name in ("fuse", "kvm")
                ],
            },
        )
        more = f'[cdi]\ndirectories = ["{place}/cdi"]\n'
        with node(place / "node", more=more) as started:
            started.hpcctr("pull", "--name", IMAGE, f"oci:{write_layout(place / 'layout', busybox())}")
            program = place / "ioctl"
            source = Path(__file__).parents[1] / "native/ioctl.c"
            flags = ["-std=gnu11", "-O2", "-static", "-Wall", "-Wextra", "-Werror"]
            subprocess.run(["gcc", *flags, "-o", program, source], check=True)
            place.chmod(0o755)
            yield started


def _run(on: Node, user: User | None, *command: str, flags: tuple[str, ...], **options: Any) -> str:
    done = on.run(IMAGE, *command, user=user, flags=flags, cwd="/tmp", **options)
    return done.stdout.decode()


def _refused(on: Node, user: User, *flags: str, status: int = 125) -> str:
    return on.run(IMAGE, "true", user=user, flags=flags, cwd="/tmp", check=status).stderr.decode()


def _program(on: Node) -> str:
    return str(on.host.root.parent / "ioctl")


def test_a_real_driver_answers_through_a_device_of_the_nodes(equipped: Node, alice: User) -> None:
    flags = ("--device", "kernel.org/misc=fuse", "-v", f"{_program(equipped)}:/ioctl")
    assert _run(equipped, alice, "/ioctl", "fuse", "/dev/fuse", flags=flags) in (
        "fuse: Operation not permitted\n",
        "fuse: Invalid argument\n",
    )


def test_a_virtual_machine_monitor_finds_kvm_where_its_user_may(equipped: Node, alice: User) -> None:
    if not Path("/dev/kvm").exists():
        pytest.skip("this machine has no /dev/kvm")
    flags = ("--device", "kernel.org/misc=kvm", "-v", f"{_program(equipped)}:/ioctl")
    assert _run(equipped, None, "/ioctl", "kvm", "/dev/kvm", flags=flags) == "kvm: version 12\n"
    mode = Path("/dev/kvm").stat().st_mode
    if not mode & stat.S_IROTH:
        text = _refused(equipped, alice, *flags)
        assert (
            "error[feature-unusable]: --device kernel.org/misc=kvm: it cannot be opened: /dev/kvm: permission" in text
        )


@pytest.mark.parametrize("user", ["alice", "root"])
def test_all_gpus_come_with_libraries_links_and_variables(equipped: Node, alice: User, user: str) -> None:
    script = "cat /usr/lib/x86_64-linux-gnu/libcuda.so.1; readlink /usr/lib/x86_64-linux-gnu/libcuda.so.1; env"
    printed = _run(equipped, alice if user == "alice" else None, "sh", "-c", script, flags=("--gpu",))
    assert "stands in for libcuda.so.550.54.15\nlibcuda.so.550.54.15\n" in printed
    assert "NVIDIA_VISIBLE_DEVICES=void\n" in printed
    assert "CUDA_VISIBLE_DEVICES" not in printed


def test_without_asking_nothing_of_the_gpus_is_inside(equipped: Node, alice: User) -> None:
    script = "ls -d /usr/lib/x86_64-linux-gnu /.hpcctr-host 2>/dev/null; env | grep NVIDIA; echo none"
    assert _run(equipped, alice, "sh", "-c", script, flags=()) == "none\n"
    assert _run(equipped, alice, "sh", "-c", script, flags=("--gpu=none",), env={"HPCCTR_GPU": "all"}) == "none\n"


def test_a_chosen_gpu_is_told_to_its_libraries(equipped: Node, alice: User) -> None:
    script = "echo $CUDA_VISIBLE_DEVICES $CUDA_DEVICE_ORDER"
    assert _run(equipped, alice, "sh", "-c", script, flags=("--gpu=1",)) == "1 PCI_BUS_ID\n"
    assert _run(equipped, alice, "sh", "-c", script, flags=("--gpu=0", "-e", "CUDA_VISIBLE_DEVICES=7")) == (
        "7 PCI_BUS_ID\n"
    )
    assert _run(equipped, alice, "sh", "-c", script, flags=(), env={"HPCCTR_GPU": "0"}) == "0 PCI_BUS_ID\n"


@contextlib.contextmanager
def _device_cgroup(user: User, *denied: tuple[int, int]) -> Iterator[Path]:
    """The device cgroup of a job, of cgroup v1; the user may move themself in."""
    directory = Path(f"/sys/fs/cgroup/devices/hpcctr-test.{os.getpid()}")
    directory.mkdir()
    try:
        for major, minor in denied:
            (directory / "devices.deny").write_text(f"c {major}:{minor} rwm")
        os.chown(directory / "cgroup.procs", user.uid, user.gid)
        yield directory / "cgroup.procs"
    finally:
        directory.rmdir()


@pytest.mark.skipif(not Path("/sys/fs/cgroup/devices").is_dir(), reason="no device cgroup of v1 here")
def test_gpus_are_those_of_the_jobs_device_cgroup(equipped: Node, alice: User) -> None:
    from tests.support.engine import HPCCTR

    def in_job(procs: Path, *flags: str, check: int = 0) -> subprocess.CompletedProcess[bytes]:
        words = [str(HPCCTR), "run", *flags, IMAGE, "--", "sh", "-c", "echo =$CUDA_VISIBLE_DEVICES="]
        script = f'echo $$ > {procs}; exec "$@"'
        return equipped.host.run(
            ["sh", "-c", script, "sh", *words], user=alice, env=equipped.environment(), cwd="/tmp", check=check
        )

    with _device_cgroup(alice, ZERO) as procs:
        # GPU 1 is the only one of this job, and so its libraries' number 0.
        assert in_job(procs, "--gpu").stdout == b"==\n"
        assert in_job(procs, "--gpu=1").stdout == b"=0=\n"
        text = in_job(procs, "--gpu=0", check=125).stderr.decode()
        assert "error[feature-unusable]: --gpu=0: GPU 0 cannot be opened" in text
        assert "hint: your job has: --gpu=1" in text
    with _device_cgroup(alice, ZERO, RANDOM) as procs:
        assert "none of the node's GPUs can be opened" in in_job(procs, "--gpu", check=125).stderr.decode()


def test_what_the_node_lacks_is_named_with_what_it_has(equipped: Node, alice: User) -> None:
    assert "error[feature]: " in (text := _refused(equipped, alice, "--device", "example.com/none=0"))
    assert "example.com/none=0" in text
    assert "error[feature]: " in (text := _refused(equipped, alice, "--gpu=7"))
    assert "7" in text
    assert "error[feature]: host feature nonesuch" in _refused(equipped, alice, "--feature", "nonesuch")
    assert "error[usage]: --gpu=0;1" in _refused(equipped, alice, "--gpu=0;1")


def test_a_driver_that_was_updated_under_its_file_is_named(equipped: Node, alice: User) -> None:
    drivers = equipped.host.root.parent / "drivers"
    old, new = drivers / "libcuda.so.550.54.15", drivers / "libcuda.so.555.42.02"
    os.rename(old, new)
    try:
        text = _refused(equipped, alice, "--gpu")
    finally:
        os.rename(new, old)
    assert "error[feature-unusable]" in text
    assert "nvidia.json" in text and "550.54.15" in text and "555.42.02" in text
    assert "nvidia-ctk cdi generate" in text


def test_explain_names_the_origin_of_every_edit(equipped: Node, alice: User) -> None:
    done = equipped.hpcctr("run", "--explain", "--gpu=0", IMAGE, "--", "true", user=alice, cwd="/tmp")
    lines = [line.split() for line in done.stdout.decode().splitlines()]
    drivers = str(equipped.host.root.parent / "drivers")
    mount = next(line for line in lines if line[:1] == ["/usr/lib/x86_64-linux-gnu/libcuda.so.550.54.15"])
    assert mount[1] == f"{drivers}/libcuda.so.550.54.15" and mount[2] == "ro" and "nvidia.json" in " ".join(mount[3:])
    assert any(line[:1] == ["NVIDIA_VISIBLE_DEVICES"] and "nvidia.json" in " ".join(line) for line in lines)
    assert any(line[:1] == ["CUDA_VISIBLE_DEVICES"] and line[-1] == "--gpu" for line in lines)
    assert any(line and line[0].endswith("/nvidia0") and "opened" in line for line in lines)


def test_policy_decides_about_devices_and_features(equipped: Node, alice: User) -> None:
    directory = equipped.site.policy_directory
    directory.mkdir(mode=0o755)
    rules = directory / "10-gpu.toml"
    try:
        rules.write_text('[[rule]]\nname = "no-gpu-1"\naction = "deny"\ndevices = ["nvidia.com/gpu=1"]\n')
        with rules.open("a") as file:
            file.write('[[rule]]\nname = "rest"\naction = "allow"\n')
        assert 'nvidia.com/gpu=1: denied by 10-gpu.toml, rule "no-gpu-1"' in _refused(
            equipped, alice, "--gpu=1", status=126
        )
        assert _run(equipped, alice, "echo", "went", flags=("--gpu=0",)) == "went\n"
        # By whatever name it comes.
        assert "device nvidia.com/gpu=1: denied by 10-gpu.toml" in _refused(equipped, alice, "--gpu", status=126)
        rules.write_text('[[rule]]\nname = "plain"\naction = "allow"\ndevices = []\nfeatures = []\n')
        assert 'rule "plain" does not cover' in _refused(equipped, alice, "--gpu=0", status=126)
    finally:
        rules.unlink()
        directory.rmdir()


def test_the_log_says_which_devices_were_asked_for(equipped: Node, alice: User) -> None:
    _run(equipped, alice, "true", flags=("--gpu=0", "--device", "kernel.org/misc=fuse"))
    granted = [line for line in equipped.engine.log().splitlines() if "granted uid=" in line][-1]
    assert "asked='nvidia.com/gpu=0,kernel.org/misc=fuse'" in granted


def test_nothing_of_a_feature_changes_who_the_program_is(equipped: Node, alice: User) -> None:
    script = "id -u; id -G; grep -E 'Cap(Eff|Prm|Bnd)|NoNewPrivs' /proc/self/status"
    plain = _run(equipped, alice, "sh", "-c", script, flags=())
    assert _run(equipped, alice, "sh", "-c", script, flags=("--gpu",)) == plain


def test_gpus_of_one_container_are_a_container_of_their_own(equipped: Node, alice: User) -> None:
    def namespace(*flags: str) -> str:
        return _run(equipped, alice, "sh", "-c", "grep -c x86_64-linux-gnu /proc/self/mountinfo; :", flags=flags)

    assert namespace() == "0\n"
    assert namespace("--gpu") == "2\n"
    assert namespace() == "0\n"
