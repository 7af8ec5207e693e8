"""What a login shell has loaded and activated stays outside; what the user has set on purpose arrives.

Real module systems and environments, activated by their own scripts in the shell that starts hpcctr.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.e2e.conftest import Profile
from tests.support.engine import HPCCTR
from tests.support.modules import INIT, MODULEFILE, System, conda_activation, conda_environment, lay_over
from tests.support.node import Node
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.network]

ON_PURPOSE = {"OMP_NUM_THREADS": "3", "SLURM_JOB_NAME": "mine", "MY_VAR": "/data/set/7", "CUDA_VISIBLE_DEVICES": "1"}


def _login(
    node: Node, user: User, setup: str, inside: str, *flags: str, image: str, env: Mapping[str, str] | None = None
) -> str:
    """What INSIDE, a program of the image's bash, prints when a login bash has done SETUP before starting hpcctr."""
    words = ["bash", "-c", f'{setup}\nexec "$@"', "bash"]
    run = [str(HPCCTR), "run", *flags, image, "--", "bash", "-c", inside]
    environment = node.environment({"SHELL": "/bin/bash", **ON_PURPOSE, **(env or {})})
    done = node.host.run([*words, *run], user=user, env=environment)
    assert done.stderr == b"", done.stderr
    return done.stdout.decode()


def _environment(text: str) -> dict[str, str]:
    """The variables that `env -0` printed."""
    return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)


@pytest.fixture(scope="module", params=["debian12_mpi_image", "debian13_mpi_image"])
def debian(request: pytest.FixtureRequest, shared_node: Node) -> str:
    """An image with bash."""
    name: str = request.getfixturevalue(request.param)
    shared_node.pull(name)
    return name


@pytest.mark.parametrize("system", ["environment-modules", "lmod"])
def test_a_loaded_module_stays_outside(
    own_node: Node, alice: User, debian12_mpi_image: str, place: Path, system: System
) -> None:
    own_node.pull(debian12_mpi_image)
    lay_over(own_node.host, system)
    tool = place / "tool"
    (tool / "bin").mkdir(parents=True)
    (tool / "bin/solver").write_text("#!/bin/sh\n")
    (tool / "bin/solver").chmod(0o755)
    (place / "modulefiles").mkdir()
    name, text = MODULEFILE[system]
    (place / "modulefiles" / name).write_text(text.replace("@", str(tool)))
    setup = f". {INIT[system]}\nmodule use {place}/modulefiles\nmodule load tool\n"

    outside = own_node.host.run(
        ["bash", "-c", f"{setup}module list 2>&1; command -v solver; env -0"], user=alice, env={"SHELL": "/bin/bash"}
    ).stdout.decode()
    assert str(tool / "bin/solver") in outside and "tool" in outside
    assert "BASH_FUNC_module" in outside and f"CUDA_HOME={tool}" in outside, "the module system has done nothing"

    image = debian12_mpi_image
    # Something that the module and the image both set: the image's tree is the one inside.
    seen = _environment(_login(own_node, alice, setup, "env -0", "-e", "LAST=1", image=image))
    assert [name for name, value in seen.items() if str(tool) in value or "modulefiles" in value] == []
    assert [name for name in seen if "odule" in name or "LMOD" in name or "MODULE" in name] == []
    assert seen["PATH"] == "/opt/programs/openmpi:/usr/local/bin:/usr/bin:/bin"
    assert {name: seen[name] for name in ON_PURPOSE} == ON_PURPOSE
    # A value that is no path and no part of the module system is what a user's own would be.
    assert seen["TOOL_SETTING"] == "fast"
    kinds = _login(own_node, alice, setup, "type -t module ml _module_raw; type -t solver; type -p ls", image=image)
    assert kinds == "/usr/bin/ls\n"


def test_an_interactive_bash_inside_says_nothing_of_modules(shared_node: Node, alice: User, debian: str) -> None:
    """A function that is exported would be parsed by the image's bash, and would call what is not there."""
    setup = (
        'module() { /nowhere/modulecmd "$@"; }\nwhich() { alias | /usr/bin/which.host "$@"; }\nexport -f module which'
    )
    inside = "PS1= bash --norc -i -c 'which sh; type -t module || echo none' 2>&1"
    text = _login(shared_node, alice, setup, inside, image=debian)
    assert text.splitlines()[-2:] == ["/usr/bin/sh", "none"]


def test_a_shells_startup_file_of_the_hosts_is_not_read(
    shared_node: Node, alice: User, debian: str, place: Path
) -> None:
    (place / "start").write_text("echo read\n")
    env = {"BASH_ENV": f"{place}/start", "ENV": f"{place}/start"}
    assert shared_node.host.run(["bash", "-c", "echo x"], user=alice, env=env).stdout == b"read\nx\n"
    # The file itself comes along with the working directory.
    for shell in (["bash", "-c"], ["sh", "-i", "-c"]):
        done = shared_node.run(debian, *shell, "cat start", user=alice, env=env, cwd=place)
        assert done.stdout == b"echo read\n"


def test_a_venv_activated_outside_stays_outside(shared_node: Node, alice: User, debian: str, place: Path) -> None:
    shared_node.host.run([sys.executable, "-m", "venv", "--without-pip", f"{alice.home}/venv"], user=alice)
    setup = f". {alice.home}/venv/bin/activate"
    assert (
        shared_node.host.run(["bash", "-c", f"{setup}; command -v python3"], user=alice)
        .stdout.decode()
        .startswith(f"{alice.home}/venv/")
    )
    seen = _environment(_login(shared_node, alice, setup, "env -0", image=debian))
    assert [name for name, value in seen.items() if "venv" in value and name != "PS1"] == []
    assert [name for name in seen if name.startswith("VIRTUAL_ENV")] == []
    found = _login(shared_node, alice, setup, "command -v python3 perl; echo done", image=debian)
    assert "venv" not in found and found.endswith("/usr/bin/perl\ndone\n")
    # The home is there, and so is the environment, for who wants it.
    assert _login(shared_node, alice, setup, f"ls {alice.home}/venv/pyvenv.cfg", image=debian).endswith("pyvenv.cfg\n")


def test_a_conda_environment_activated_outside_stays_outside(
    shared_node: Node, alice: User, debian: str, place: Path
) -> None:
    prefix = Path(alice.home) / "envs-climate"
    if not prefix.exists():
        conda_environment(prefix)
    setup = conda_activation(prefix)
    outside = shared_node.host.run(
        ["bash", "-c", f"{setup}\npython3; echo $PROJ_DATA; echo $MY_PROJECT"], user=alice
    ).stdout.decode()
    assert outside == f"python of the environment outside\n{prefix}/share/proj\nweather\n"

    seen = _environment(_login(shared_node, alice, setup, "env -0", image=debian))
    assert [name for name, value in seen.items() if str(prefix) in value or "conda" in value.lower()] == []
    assert [name for name in seen if "CONDA" in name or "MAMBA" in name or name.startswith("_CE_")] == []
    assert {name: seen[name] for name in ON_PURPOSE} == ON_PURPOSE
    assert seen["MY_PROJECT"] == "weather"


def test_explain_names_what_stays_outside_and_why(shared_node: Node, alice: User, debian: str) -> None:
    env = shared_node.environment({"CONDA_PREFIX": "/opt/env", "PROJ_DATA": "/opt/env/share", "TMPDIR": "/nowhere"})
    argv = [str(HPCCTR), "run", "--explain", debian, "--", "true"]
    text = shared_node.host.run(argv, user=alice, env=env).stdout.decode()
    for name, why in (
        ("CONDA_PREFIX", "describes the host's files"),
        ("PROJ_DATA", "lies in an environment activated outside"),
        ("TMPDIR", "no such directory"),
    ):
        assert any(line.split(maxsplit=1) == [name, why] for line in text.splitlines()), text


def test_a_variable_that_stays_outside_comes_in_when_asked_for(gateway: Profile) -> None:
    text = gateway.output("env", flags=["-e", "LD_LIBRARY_PATH", "-e", "CONDA_PREFIX"], env={"LD_LIBRARY_PATH": "/x"})
    assert "LD_LIBRARY_PATH=/x\n" in text and "CONDA_PREFIX" not in text
