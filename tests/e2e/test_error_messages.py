"""Every way a launch can fail names the thing, the reason and the remedy, and ends with the status it should."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import Profile
from tests.support import oci
from tests.support.engine import HPCCTR
from tests.support.node import Node
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.usefixtures("module_leaves_nothing")]


def _require(text: str, slug: str, *words: str) -> None:
    first, *rest = text.splitlines()
    assert first.startswith(f"hpcctr: error[{slug}]: "), text
    assert rest and rest[-1].startswith("hint: "), text
    for word in words:
        assert word in text, f"{word!r} is not in {text}"


def test_a_command_the_image_lacks(profile: Profile) -> None:
    _require(profile.refusal("no-such-program", status=127), "command-not-found", "no-such-program")


def test_a_file_that_cannot_be_executed(profile: Profile) -> None:
    _require(profile.refusal("/etc/passwd", status=126), "not-executable", "/etc/passwd")


def test_an_image_that_is_not_in_the_store(gateway: Profile) -> None:
    done = gateway.node.run("no/such:1", "true", user=gateway.user, check=125)
    _require(done.stderr.decode(), "image-not-in-store", "no/such:1", "hpcctr pull no/such:1")


def test_root_pulls_what_is_missing_and_is_told_when_that_fails(shared_node: Node) -> None:
    done = shared_node.run("127.0.0.1:1/no/such:1", "true", check=125)
    assert "error[registry]" in done.stderr.decode()
    done = shared_node.run("127.0.0.1:1/no/such:1", "true", flags=["--pull", "never"], check=125)
    assert "error[image-not-in-store]" in done.stderr.decode()


@pytest.mark.parametrize("name", ["UPPER", "a b", "", "x:y:z:", "../x"])
def test_an_image_name_that_is_none(profile: Profile, name: str) -> None:
    done = profile.node.run(name, "true", user=profile.user, check=125)
    _require(done.stderr.decode(), "image-name")


def test_a_working_directory_that_is_not_inside(profile: Profile) -> None:
    _require(profile.refusal("true", flags=["-w", "/no/such"]), "cwd", "/no/such", "-w")


def test_a_working_directory_that_was_deleted(gateway: Profile) -> None:
    script = f'd=$(mktemp -d) && cd "$d" && rmdir "$d" && exec {HPCCTR} run {gateway.image} -- true'
    done = gateway.node.host.run(["sh", "-c", script], user=gateway.user, env=gateway.node.environment(), check=125)
    _require(done.stderr.decode(), "cwd", "-w DIR")


def test_a_volume_whose_source_is_missing(profile: Profile) -> None:
    _require(profile.refusal("true", flags=["-v", "/no/such:/x"]), "mount-source", "/no/such")


@pytest.mark.parametrize("target", ["/proc/x", "/dev/shm", "/", "/run/hpcctr", "relative"])
def test_a_volume_whose_target_is_the_nodes(profile: Profile, target: str) -> None:
    _require(profile.refusal("true", flags=["-v", f"/tmp:{target}"], status=126), "mount-target", "/tmp")


def test_a_volume_whose_target_cannot_be_made_in_the_image(profile: Profile) -> None:
    _require(profile.refusal("true", flags=["-v", "/tmp:/etc/passwd/x"], status=126), "mount-target", "/etc/passwd/x")
    _require(profile.refusal("true", flags=["-v", "/tmp:/etc/passwd"], status=126), "mount-target", "/etc/passwd")


def test_an_unknown_option(profile: Profile) -> None:
    done = profile.node.hpcctr("run", "--gpux", profile.image, user=profile.user, check=2)
    assert "--gpux" in done.stderr.decode()


def test_a_caller_with_no_new_privs(gateway: Profile) -> None:
    argv = ["setpriv", "--no-new-privs", str(HPCCTR), "run", gateway.image, "--", "true"]
    done = gateway.node.host.run(argv, user=gateway.user, env=gateway.node.environment(), check=126)
    _require(done.stderr.decode(), "no-new-privs", "no_new_privs")


def test_a_traced_caller(gateway: Profile) -> None:
    argv = ["strace", "-f", "-o", "/dev/null", str(HPCCTR), "run", gateway.image, "--", "true"]
    done = gateway.node.host.run(argv, user=gateway.user, env=gateway.node.environment(), check=126)
    _require(done.stderr.decode(), "traced", "strace")


def test_a_caller_in_a_user_namespace(gateway: Profile) -> None:
    argv = ["unshare", "--user", "--map-current-user", str(HPCCTR), "run", gateway.image, "--", "true"]
    done = gateway.node.host.run(argv, user=gateway.user, env=gateway.node.environment(), check=126)
    _require(done.stderr.decode(), "caller-refused", "user namespace")


def test_no_engine(own_node_with_busybox: Profile) -> None:
    own_node_with_busybox.node.engine.stop()
    _require(own_node_with_busybox.refusal("true"), "no-engine", "/run/hpcctr/engine.sock", "hpcctr doctor")


def test_no_containerd(own_node_with_busybox: Profile) -> None:
    node = own_node_with_busybox.node
    node.containerd.process.kill()
    node.containerd.process.wait()
    for user in (own_node_with_busybox.user, None):
        text = node.run(own_node_with_busybox.image, "true", user=user, check=125).stderr.decode()
        _require(text, "no-containerd", str(node.containerd.socket))
    node.containerd.restart()
    node.run(own_node_with_busybox.image, "true", user=own_node_with_busybox.user)


def test_enter_without_capabilities(own_node_with_busybox: Profile, place: Path) -> None:
    profile = own_node_with_busybox
    bare = place / "enter"
    bare.write_bytes(profile.node.site.enter.read_bytes())
    bare.chmod(0o711)
    text = profile.node.site.file.read_text().replace(str(profile.node.site.enter), str(bare))
    profile.node.site.file.write_text(text)
    profile.node.engine.restart()
    _require(profile.refusal("true"), "enter-unusable", str(bare), "hpcctr engine install")
    done = profile.node.hpcctr("doctor", user=profile.user, check=1)
    assert "MISSING enter" in done.stdout.decode()


def test_a_site_file_that_is_wrong(own_node_with_busybox: Profile) -> None:
    node = own_node_with_busybox.node
    with node.site.file.open("a") as file:
        file.write("colour = 1\n")
    done = node.hpcctr("images", user=own_node_with_busybox.user, check=125)
    _require(done.stderr.decode(), "site-file", str(node.site.file), "colour")


def test_a_policy_that_denies_and_one_that_is_broken(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    directory = profile.node.site.policy_directory
    directory.mkdir(mode=0o755)
    (directory / "10-no.toml").write_text('[[rule]]\nname = "nobody"\naction = "deny"\n')
    _require(profile.refusal("true", status=126), "policy-denied", '10-no.toml, rule "nobody"')
    (directory / "10-no.toml").write_text("[[rule]\n")
    _require(profile.refusal("true", status=126), "policy-unusable", "10-no.toml")


def test_a_store_users_could_write_is_not_mounted(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    profile.node.site.store.chmod(0o777)
    _require(profile.refusal("true"), "store", str(profile.node.site.store))


def test_a_store_that_cannot_be_read(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    profile.node.site.store.chmod(0o700)
    done = profile.node.hpcctr("images", user=profile.user, check=125)
    _require(done.stderr.decode(), "store", str(profile.node.site.store))


def _pull_refusal(node: Node, source: str, user: User | None = None) -> str:
    return node.hpcctr("pull", source, user=user, check=125).stderr.decode()


def test_pulling_what_is_no_image(shared_node: Node, place: Path) -> None:
    (place / "text.tar").write_text("not a tar file")
    (place / "empty").mkdir()
    subprocess.run(["tar", "-cf", place / "other.tar", "-C", "/etc", "hostname"], check=True)
    for source in (f"oci-archive:{place}/text.tar", f"docker-archive:{place}/other.tar", f"oci:{place}/empty"):
        text = _pull_refusal(shared_node, source)
        assert "error[not-an-image]" in text, text
        assert str(place) in text
    assert "no such file" in _pull_refusal(shared_node, f"oci-archive:{place}/none.tar")


def test_pulling_a_truncated_archive_publishes_nothing(shared_node: Node, busybox_image: str, place: Path) -> None:
    whole = place / "whole.tar"
    subprocess.run(["tar", "-cf", whole, "-C", busybox_image.split(":")[1], "."], check=True)
    cut = place / "cut.tar"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    before = shared_node.hpcctr("images", "--format", "json").stdout
    text = _pull_refusal(shared_node, f"oci-archive:{cut}")
    assert "error[image-broken]" in text or "error[not-an-image]" in text, text
    assert shared_node.hpcctr("images", "--format", "json").stdout == before
    assert not list((shared_node.site.store / "tmp").iterdir())


def test_an_image_for_another_architecture(shared_node: Node, alice: User, busybox_image: str, place: Path) -> None:
    text = shared_node.hpcctr("pull", "--platform", "linux/s390x", busybox_image, check=125).stderr.decode()
    assert "error[platform]" in text and "s390x" in text, text
    layout = oci.write_layout(place / "arm", oci.Image(architecture="arm64", layers=(oci.tar(oci.directory("etc")),)))
    shared_node.hpcctr("pull", "--platform", "linux/arm64", "--name", "local/arm:1", f"oci:{layout}")
    for user in (alice, None):
        text = shared_node.run("local/arm:1", "true", user=user, flags=["--pull", "never"], check=125).stderr.decode()
        _require(text, "platform", "local/arm:1", "linux/arm64")
    shared_node.hpcctr("rm", "local/arm:1")


def test_pulling_without_the_right_to_write_the_store(shared_node: Node, alice: User) -> None:
    text = shared_node.hpcctr("pull", "localhost:1/app:1", user=alice, check=126).stderr.decode()
    _require(text, "pull-refused", str(shared_node.site.store), "hpcctr pull IMAGE", "chown -R hpcctr:")


def test_pulling_onto_a_full_disk_publishes_nothing(own_node: Node, busybox_image: str) -> None:
    store = own_node.site.store
    own_node.host.run(["mount", "-t", "tmpfs", "-o", "size=600k,mode=755", "tmpfs", str(store)])
    text = _pull_refusal(own_node, busybox_image)
    assert "no space left" in text, text
    assert "error[store]" in text or "error[conversion]" in text, text
    assert own_node.hpcctr("images", "--format", "json").stdout == b"[]\n"
    assert own_node.host.run(["ls", "-A", f"{store}/tmp"]).stdout == b""
