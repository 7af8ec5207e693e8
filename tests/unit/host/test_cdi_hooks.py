"""Hooks of CDI files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from hpcctr.errors import FeatureUnusable
from hpcctr.host.cdi_hooks import Done, Hooks
from hpcctr.host.cdi_written import Hook
from hpcctr.host.edits import DeviceEdit, HookEdit, LinkEdit
from tests.support.scratch import scratch

FILE = "/etc/cdi/nvidia.yaml"


def nvidias(*words: str, stage: str = "createContainer") -> Hook:
    return Hook(
        stage=stage,
        path="/usr/bin/nvidia-cdi-hook",
        args=("nvidia-cdi-hook", *words),
        env=("NVIDIA_CTK_DEBUG=false",),
        timeout=None,
    )


def collect(
    *several: Hook, allowed: Sequence[str] = (), image_env: Sequence[str] = (), root_owned: bool = True
) -> Hooks:
    hooks = Hooks(allowed=allowed, image_env=image_env, root_owned=root_owned)
    for hook in several:
        hooks.add(hook, file=FILE, device="nvidia.com/gpu=0", origin="origin")
    return hooks


def refusal(hook: Hook, *, allowed: Sequence[str] = ()) -> FeatureUnusable:
    with pytest.raises(FeatureUnusable) as raised:
        collect(hook, allowed=allowed)
    assert FILE in raised.value.message and raised.value.hint
    return raised.value


@pytest.mark.parametrize(
    "words",
    [
        ("--link", "libcuda.so.1::/usr/lib/libcuda.so", "--link", "../a::/opt/b"),
        ("--link=libcuda.so.1::/usr/lib/libcuda.so", "-link=../a::/opt/b"),
        ("--link", "libcuda.so.1::/usr/lib/libcuda.so,../a::opt//b"),
    ],
)
def test_symbolic_links_are_made_and_no_program_is_run(words: tuple[str, ...]) -> None:
    for stage in ("createContainer", "startContainer"):
        done = collect(nvidias("create-symlinks", *words, stage=stage)).done
        assert done.links == [
            LinkEdit(path="/usr/lib/libcuda.so", target="libcuda.so.1", origin="origin"),
            LinkEdit(path="/opt/b", target="../a", origin="origin"),
        ]
        assert done.hooks == []


def test_folders_of_libraries_are_told_once_and_in_order() -> None:
    done = collect(
        nvidias("update-ldcache", "--ldconfig-path", "/sbin/ldconfig", "--folder", "/usr/lib", "--folder", "/opt/lib"),
        nvidias("update-ldcache", "--folder=/usr/lib/,/lib/vdpau"),
    ).done
    assert done.library_folders == ["/usr/lib", "/opt/lib", "/lib/vdpau"]


def test_what_such_a_hook_prevents_cannot_happen_here() -> None:
    hooks = collect(
        nvidias("disable-device-node-modification"),
        nvidias("chmod", "--mode", "755", "--path", "/dev/dri"),
        nvidias("noop"),
    )
    assert hooks.done == Done() and hooks.files([]) == ()


def test_the_hook_of_the_older_program_is_the_same() -> None:
    hook = Hook(
        stage="createContainer",
        path="/usr/local/bin/nvidia-ctk",
        args=("nvidia-ctk", "hook", "update-ldcache", "--folder", "/usr/lib64"),
        env=(),
        timeout=None,
    )
    assert collect(hook).done.library_folders == ["/usr/lib64"]


def test_the_application_profile_names_the_gpus_of_the_launch() -> None:
    def node(path: str, minor: int) -> DeviceEdit:
        return DeviceEdit(path=path, kind="c", major=195, minor=minor, permissions="rwm", device="d", origin="o")

    hooks = collect(nvidias("update-application-profile"))
    nodes = [node("/dev/nvidia0", 0), node("/dev/nvidia5", 5), node("/dev/nvidiactl", 255), node("/dev/nvidia99", 99)]
    (file,) = hooks.files(nodes)
    assert file.path == "/etc/nvidia/nvidia-application-profiles-rc.d/10-container.conf" and file.origin == "origin"
    # The driver takes hexadecimal numbers, which are none of JSON.
    found = json.loads(file.content.replace(b"0x21", b"33"))
    assert found["profiles"][0]["settings"] == ["EGLVisibleDGPUDevices", 33]
    assert found["rules"] == [{"pattern": [], "profile": found["profiles"][0]["name"]}]
    assert hooks.files(nodes[2:]) == () and collect().files(nodes) == ()


@pytest.mark.parametrize(
    ("driver", "cuda", "is_said"),
    [
        ("550.54.15", "12.4.1", False),
        ("550.54.15", "13.0.0", True),
        ("470.1", "12.0", True),
        ("470.1", "11.8", False),
        ("580.1", "13.0", False),
        ("550.54.15", "", False),
        ("550.54.15", "x", False),
        ("", "13.0.0", False),
        ("550.54.15", "99.0", False),
    ],
)
def test_an_image_for_a_newer_cuda_than_the_drivers_is_said(driver: str, cuda: str, is_said: bool) -> None:
    hook = nvidias("enable-cuda-compat", f"--host-driver-version={driver}")
    done = collect(hook, image_env=["PATH=/bin", f"CUDA_VERSION={cuda}"]).done
    assert bool(done.warnings) is is_said
    if is_said:
        assert done.warnings == [
            f"the image is for CUDA {cuda}, and this node's driver {driver} is for an older one: if the image has"
            " libraries for that in /usr/local/cuda/compat, give -e LD_LIBRARY_PATH=/usr/local/cuda/compat"
        ]


@pytest.mark.parametrize(
    "words",
    [
        ("create-symlinks", "--link"),
        ("create-symlinks", "--link", "a"),
        ("create-symlinks", "--link", "a::b::c"),
        ("create-symlinks", "--link", "::/b"),
        ("create-symlinks", "--link", "a::"),
        ("create-symlinks", "--link", "a::/../b"),
        ("create-symlinks", "--link", "a::/dev/b"),
        ("create-symlinks", "--link", "a::/run/hpcctr/b"),
        ("create-symlinks", "--force", "x"),
        ("create-symlinks", "a::/b"),
        ("update-ldcache", "--folder", "/"),
        ("update-ldcache", "--folder", "/usr/../lib"),
        ("update-ldcache", "--container-spec", "/etc/shadow"),
        ("enable-cuda-compat", "--host-driver-version"),
    ],
)
def test_words_that_are_not_known_are_refused(words: tuple[str, ...]) -> None:
    assert f"{FILE}: hook {words[0]}: " in refusal(nvidias(*words)).message


@pytest.mark.parametrize("words", [(), ("make-coffee",), ("hook", "create-symlinks"), ("--debug", "create-symlinks")])
def test_a_command_of_nvidias_that_is_not_known_is_any_programs(words: tuple[str, ...]) -> None:
    assert "wants a program run as root: /usr/bin/nvidia-cdi-hook" in refusal(nvidias(*words)).message


@pytest.fixture
def program() -> Iterator[str]:
    """A program that only root can write."""
    with scratch("cdi") as made:
        path = Path(made) / "hook"
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        yield str(path)


def other(path: str, *, stage: str = "createRuntime", env: tuple[str, ...] = (), timeout: int | None = None) -> Hook:
    return Hook(stage=stage, path=path, args=("hook", "--all", "x"), env=env, timeout=timeout)


def test_any_other_program_runs_only_where_the_site_names_it(program: str) -> None:
    error = refusal(other(program), allowed=[program + "x", "/bin/hook"])
    assert error.message == (
        f"device nvidia.com/gpu=0: {FILE} wants a program run as root: {program} --all x (createRuntime)"
    )
    assert error.hint == f'hooks = ["{program}"] in [cdi] of site.toml allows it'


@pytest.mark.root
def test_a_program_the_site_names_gets_the_files_environment_and_a_path(program: str) -> None:
    path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"
    for stage in ("prestart", "createRuntime"):
        for env, all_of_it in (((), (path,)), (("A=1",), (path, "A=1")), (("PATH=/x", "B="), ("PATH=/x", "B="))):
            done = collect(other(program, stage=stage, env=env, timeout=7), allowed=[program]).done
            assert done.hooks == [
                HookEdit(
                    stage=stage,
                    path=program,
                    args=("hook", "--all", "x"),
                    env=all_of_it,
                    timeout=7,
                    origin="origin",
                )
            ]


@pytest.mark.root
def test_a_stage_that_never_comes_and_a_time_that_is_none_are_refused(program: str) -> None:
    for stage in ("startContainer", "poststart", "poststop"):
        assert f"{stage} never comes" in refusal(other(program, stage=stage), allowed=[program]).message
    for timeout in (0, -1):
        assert f"timeout {timeout} is no time" in refusal(other(program, timeout=timeout), allowed=[program]).message


@pytest.mark.root
@pytest.mark.parametrize(
    "what", ["gone", "directory", "not-executable", "writable", "users", "link-of-a-user", "relative"]
)
def test_a_program_that_is_not_roots_alone_is_refused_even_where_it_is_named(program: str, what: str) -> None:
    path = Path(program)
    if what in ("gone", "directory", "link-of-a-user"):
        path.unlink()
    if what == "directory":
        path.mkdir()
    elif what == "not-executable":
        path.chmod(0o644)
    elif what == "writable":
        path.chmod(0o775)
    elif what == "users":
        os.chown(path, 61100, 61100)
    elif what == "link-of-a-user":
        path.symlink_to("/bin/true")
        os.lchown(path, 61100, 61100)
    name = "hook" if what == "relative" else program
    said = {
        "gone": "no such file",
        "directory": "is no program",
        "not-executable": "is no program",
        "relative": "absolute",
    }
    assert said.get(what, "not root's alone") in refusal(other(name), allowed=[name]).message


@pytest.mark.root
def test_a_program_that_would_work_in_the_images_root_is_refused_whoever_names_it(program: str) -> None:
    with pytest.raises(FeatureUnusable, match="createContainer, where runtimes work in the image's root directory"):
        collect(other(program, stage="createContainer", env=(), timeout=7), allowed=[program])
