"""Images as Spack, micromamba and NGC make them: their programs, variables and entry scripts work, and the caller stays
the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import Profile
from tests.support import oci, site_images
from tests.support.node import Node

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.usefixtures("module_leaves_nothing")]


def _kind(name: str, build: Callable[[], oci.Image]) -> Callable[..., Profile]:
    """A fixture: every mode with this image in place of the tiny one."""

    @pytest.fixture(name=name)
    def made(profile: Profile, shared_node: Node, tmp_path_factory: pytest.TempPathFactory) -> Profile:
        image = f"local/{name}:1"
        listed = shared_node.hpcctr("images", "--format", "json").stdout.decode()
        if image not in listed:
            layout = oci.write_layout(tmp_path_factory.mktemp(name) / "layout", build())
            shared_node.hpcctr("pull", "--name", image, f"oci:{layout}")
        return Profile(name=profile.name, node=shared_node, user=profile.user, image=image)

    return made


spack = _kind("spack", site_images.spack)
micromamba = _kind("micromamba", site_images.micromamba)
ngc = _kind("ngc", site_images.ngc)


def _without_command(profile: Profile, *flags: str, script: str, **env: str) -> str:
    """What ``hpcctr run FLAGS IMAGE`` prints when its shell is given a script to read."""
    done = profile.node.hpcctr(
        "run", *flags, profile.image, user=profile.user, env=env, input=script.encode(), check=True
    )
    return done.stdout.decode()


def test_programs_of_a_spack_view_are_found_through_all_links(spack: Profile) -> None:
    text = spack.output("tool7", env={"PATH": "/opt/modules/bin:/usr/bin:/bin", "SPACK_ROOT": "/opt/spack"})
    assert text.startswith("tool7 /opt/software/linux-debian12-x86_64_v3/gcc-12.2.0/pkg7-1.7-") and text.endswith(
        "/bin\n"
    )
    assert spack.output("sh", "-c", "cat /opt/views/view/lib/*.so | wc -c") == f"{40 * len('library')}\n"
    script = "echo ${SPACK_ROOT-none} ${SPACK_ENV-none} $LD_LIBRARY_PATH"
    env = {"SPACK_ROOT": "/opt/spack", "LD_LIBRARY_PATH": "/host/lib"}
    assert spack.output("sh", "-c", script, env=env) == "none none /opt/views/view/lib\n"


def test_an_entry_script_runs_without_a_command_or_when_named(spack: Profile) -> None:
    assert "SPACK_ENV=/opt/spack-environment\n" in _without_command(spack, script="env")
    assert "SPACK_ENV" not in spack.output("env")
    assert "SPACK_ENV=/opt/spack-environment\n" in spack.output("env", flags=["--entrypoint", "/entrypoint.sh"])


def test_a_volume_over_a_spack_view_is_refused_with_the_place_it_leads_to(spack: Profile) -> None:
    text = spack.refusal("true", flags=["-v", "/tmp:/opt/views/view"], status=126)
    assert "error[mount-target]" in text and "/opt/views/._view/" in text


def test_a_micromamba_image_brings_its_own_environment(micromamba: Profile) -> None:
    outside = {
        "CONDA_PREFIX": "/home/me/miniconda3",
        "MAMBA_ROOT_PREFIX": "/home/me/micromamba",
        "MAMBA_EXE": "/home/me/bin/micromamba",
        "CONDA_SHLVL": "2",
        "PATH": "/home/me/miniconda3/bin:/usr/bin:/bin",
    }
    assert micromamba.output("python", env=outside) == "python of the image, prefix not activated\n"
    flags = ["--entrypoint", "/usr/local/bin/_entrypoint.sh"]
    assert micromamba.output("python", env=outside, flags=flags) == "python of the image, prefix /opt/conda\n"
    seen = micromamba.output("sh", "-c", "echo $MAMBA_ROOT_PREFIX $MAMBA_EXE ${CONDA_SHLVL-none}", env=outside)
    assert seen == "/opt/conda /bin/micromamba none\n"


def test_an_image_with_a_user_runs_as_the_caller_where_the_caller_is(micromamba: Profile) -> None:
    assert (
        micromamba.output("sh", "-c", "id -u; pwd")
        == f"{micromamba.uid}\n{micromamba.home if micromamba.user else '/'}\n"
    )


def test_an_ngc_image_says_its_banner_only_when_its_entry_script_runs(ngc: Profile) -> None:
    banner = "=============\n== PyTorch ==\n=============\n"
    assert ngc.output("nvcc") == "nvcc of the image below /usr/local/cuda\n"
    assert _without_command(ngc, script="nvcc") == f"{banner}nvcc of the image below /usr/local/cuda\n"
    flags = ["--entrypoint", "/opt/nvidia/nvidia_entrypoint.sh"]
    assert ngc.output("nvcc", flags=flags) == f"{banner}nvcc of the image below /usr/local/cuda\n"


def test_an_ngc_images_variables_win_over_those_of_a_module_loaded_outside(ngc: Profile) -> None:
    outside = {
        "CUDA_HOME": "/opt/cuda/11.8",
        "LD_LIBRARY_PATH": "/opt/cuda/11.8/lib64",
        "LIBRARY_PATH": "/opt/cuda/11.8/lib64/stubs",
        "OPAL_PREFIX": "/opt/openmpi/4.1",
        "ENV": "/etc/profile.d/site.sh",
        "SHELL": "/opt/site/bin/zsh",
        "NVIDIA_VISIBLE_DEVICES": "1",
        "CUDA_VISIBLE_DEVICES": "1",
        "OMP_NUM_THREADS": "4",
    }
    seen = dict(line.split("=", 1) for line in ngc.output("env", env=outside).splitlines() if "=" in line)
    assert (seen["CUDA_HOME"], seen["OPAL_PREFIX"], seen["ENV"], seen["SHELL"]) == (
        "/usr/local/cuda",
        "/opt/hpcx/ompi",
        "/etc/shinit_v2",
        "/bin/bash",
    )
    assert "11.8" not in str(seen)
    assert (seen["NVIDIA_VISIBLE_DEVICES"], seen["CUDA_VISIBLE_DEVICES"], seen["OMP_NUM_THREADS"]) == ("1", "1", "4")
    assert len([name for name in seen if name.startswith("NVIDIA_COMPONENT_")]) == 90


def test_an_images_working_directory_is_a_choice(ngc: Profile, place: Path) -> None:
    assert ngc.output("pwd", cwd=place) == f"{place}\n"
    assert ngc.output("cat", "README.md", flags=["-w", "/workspace"]) == "workspace of the image\n"
    text = ngc.output("sh", "-c", "pwd; ls", flags=["-v", f"{place}:/workspace", "-w", "/workspace"])
    assert text.splitlines()[0] == "/workspace" and "README.md" not in text
