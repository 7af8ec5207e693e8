"""Images reach the store from every source, whole or not at all, and what is in the file is what the layers say."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcctr.errors import (
    ConversionFailed,
    HpcctrError,
    ImageBroken,
    ImageNotInStore,
    NotAnImage,
    PlatformMissing,
    RegistryFailed,
    StoreUnusable,
)
from hpcctr.image import platform as platforms
from hpcctr.image.publish import remove
from hpcctr.image.pull import Progress, PullResult, pull
from hpcctr.image.reference import ImageRef
from hpcctr.image.store import Store
from hpcctr.site import Site
from tests.support.oci import (
    OCI_CONFIG,
    OCI_LAYER,
    OCI_MANIFEST,
    Compression,
    Image,
    Member,
    busybox,
    character_device,
    compress,
    descriptor,
    digest_of,
    directory,
    fifo,
    file,
    hardlink,
    layout_files,
    opaque,
    symlink,
    tar,
    whiteout,
    write_docker_archive,
    write_files,
    write_layout,
    write_oci_archive,
)
from tests.support.polling import wait_until
from tests.support.registry import Registry
from tests.support.users import User

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="unpacks owners and modes")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(store=str(tmp_path / "store"))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry.start(tmp_path_factory.mktemp("registry")) as running:
        yield running


def pulled(text: str, site: Site, **options: object) -> PullResult:
    return pull(ImageRef.parse(text), site=site, **options)  # type: ignore[arg-type]


def unpacked(result: PullResult, target: Path) -> Path:
    command = ["unsquashfs", "-no-progress", "-quiet", "-d", str(target), result.image.path]
    subprocess.run(command, check=True, capture_output=True)
    return target


def nothing_is_left(site: Site) -> bool:
    """Whether a store that refused an image is as if nothing had happened."""
    top = Path(site.store)
    return not any(list((top / name).iterdir()) for name in ("images", "names", "tmp"))


SMALL = Image(layers=(tar(directory("etc"), file("etc/motd", b"hello\n")),))


# every source


def sources(tmp_path: Path, image: Image) -> dict[str, str]:
    """The image in every kind of file, by reference."""
    plain = write_docker_archive(tmp_path / "saved.tar", image, tags=["python:3.12"])
    (tmp_path / "saved.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    return {
        f"oci:{write_layout(tmp_path / 'layout', image, ref='v1')}:v1": "localhost/layout:v1",
        f"oci-archive:{write_oci_archive(tmp_path / 'app.tar', image)}": "localhost/app:latest",
        f"docker-archive:{plain}": "localhost/saved:latest",
        f"docker-archive:{tmp_path / 'saved.tar.gz'}": "localhost/saved:latest",
    }


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_an_image_comes_from_every_kind_of_file(tmp_path: Path, site: Site, compression: Compression) -> None:
    image = dataclasses.replace(busybox(), compression=compression)
    for text, name in sources(tmp_path, image).items():
        result = pulled(text, site)
        assert result.name == name
        assert Store.open(site.store).find(name).record == result.image.record
        assert Store.open(site.store).find(text).record == result.image.record
        assert result.image.record.passwd.startswith(b"root:x:0:0")
        assert result.image.record.group.startswith(b"root:x:0:")
        assert result.image.record.config.cmd == ("/bin/sh",)


@pytest.mark.parametrize("docker", [False, True])
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_an_image_comes_from_a_registry(registry: Registry, site: Site, docker: bool, compression: Compression) -> None:
    layers = [tar(file(f"layer{number}", os.urandom(5000))) for number in range(6)]
    image = dataclasses.replace(busybox(layers=layers), compression=compression, docker=docker)
    tag = f"{compression}-{docker}"
    digest = registry.push_image("hpc/app", tag, image)
    seen: list[Progress] = []
    result = pulled(f"{registry.address}/hpc/app:{tag}", site, progress=seen.append)
    assert (result.image.record.digest, result.was_stored) == (digest, False)
    assert {event.stage for event in seen} == {"download", "read", "write"}
    for stage in ("download", "read", "write"):
        last = [event for event in seen if event.stage == stage][-1]
        assert last.done == last.total > 0
    assert pulled(f"{registry.address}/hpc/app:{tag}", site).was_stored
    by_digest = pulled(f"docker://{registry.address}/hpc/app@{digest}", site)
    assert by_digest.name == f"{registry.address}/hpc/app@{digest}"
    assert Store.open(site.store).find(by_digest.name).record.digest == digest


def test_skopeo_and_a_registry_carry_an_image_here_unchanged(tmp_path: Path, registry: Registry, site: Site) -> None:
    archive = write_oci_archive(tmp_path / "app.tar", busybox(), ref="x")
    for kind in ("oci", "v2s2"):
        target = f"{registry.address}/copied:{kind}"
        subprocess.run(
            ["skopeo", "copy", "--insecure-policy", "--format", kind, "--dest-tls-verify=false"]
            + [f"oci-archive:{archive}", f"docker://{target}"],
            check=True,
            capture_output=True,
        )
        assert pulled(target, site).image.record.config.cmd == ("/bin/sh",)


def test_the_same_image_gives_the_same_file(tmp_path: Path, site: Site) -> None:
    archive = write_oci_archive(tmp_path / "app.tar", busybox(layers=[tar(whiteout("bin/vi"))]))
    first = pulled(f"oci-archive:{archive}", site).image.record
    remove(Store.open(site.store), first.digest)
    second = pulled(f"oci-archive:{archive}", site).image.record
    assert first.file_digest == second.file_digest


@pytest.mark.parametrize("damage", ["file gone", "file cut", "record gone", "record damaged"])
def test_a_damaged_image_is_pulled_again(tmp_path: Path, site: Site, damage: str) -> None:
    text = f"oci-archive:{write_oci_archive(tmp_path / 'app.tar', busybox())}"
    image = pulled(text, site).image
    path = Path(image.path)
    if damage == "file gone":
        path.unlink()
    elif damage == "file cut":
        os.truncate(path, 1000)
    elif damage == "record gone":
        (path.parent / "image.json").unlink()
    else:
        (path.parent / "image.json").write_text("{")
    result = pulled(text, site)
    assert not result.was_stored
    assert result.image.record.file_digest == image.record.file_digest
    os.close(Store.open(site.store).open_image_file(result.image))


def test_the_record_tells_size_and_digest_of_the_file(tmp_path: Path, site: Site) -> None:
    image = pulled(f"oci-archive:{write_oci_archive(tmp_path / 'app.tar', busybox())}", site).image
    content = Path(image.path).read_bytes()
    assert image.record.file_size == len(content)
    assert image.record.file_digest == f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_everybody_can_read_what_a_pull_with_a_tight_umask_wrote(tmp_path: Path, site: Site) -> None:
    earlier = os.umask(0o077)
    try:
        pulled(f"oci-archive:{write_oci_archive(tmp_path / 'app.tar', SMALL)}", site)
    finally:
        os.umask(earlier)
    for path in Path(site.store).rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        expected = 0o700 if path.name == "tmp" else 0o755 if path.is_dir() else 0o644
        assert (str(path), oct(mode)) == (str(path), oct(expected))
        assert path.stat().st_uid == os.geteuid()


# choice


def test_the_right_image_of_an_index_is_taken(tmp_path: Path, registry: Registry, site: Site) -> None:
    members = {
        "linux/amd64": Image(layers=(tar(file("amd64")),), architecture="amd64"),
        "linux/arm64": Image(layers=(tar(file("arm64")),), architecture="arm64", variant="v8"),
        "linux/arm/v6": Image(layers=(tar(file("v6")),), architecture="arm", variant="v6"),
        "linux/arm": Image(layers=(tar(file("v7")),), architecture="arm", variant="v7"),
    }
    registry.push_image("multi", "1", list(members.values()))
    layout = write_layout(tmp_path / "multi", list(members.values()))
    for text in (f"{registry.address}/multi:1", f"oci:{layout}"):
        for wanted, image in members.items():
            result = pulled(text, site, platform=platforms.parse(wanted))
            assert result.image.record.digest == image.digest
            assert str(result.image.record.platform) == wanted
            assert Store.open(site.store).find(result.name, platforms.parse(wanted)).record.digest == image.digest
        with pytest.raises(PlatformMissing, match="linux/arm64"):
            pulled(text, site, platform=platforms.parse("riscv64"))
    with pytest.raises(PlatformMissing, match="linux/amd64, linux/arm, linux/arm-v6|linux/amd64"):
        Store.open(site.store).find(f"{registry.address}/multi:1", platforms.parse("s390x"))


def test_an_index_in_an_index_is_followed(tmp_path: Path, site: Site) -> None:
    files = layout_files([SMALL, dataclasses.replace(SMALL, architecture="riscv64")])
    inner = json.loads(files["index.json"])["manifests"][0]
    outer = json.dumps({"schemaVersion": 2, "manifests": [inner]}).encode()
    files[f"blobs/sha256/{digest_of(outer)[7:]}"] = outer
    files["index.json"] = json.dumps(
        {"schemaVersion": 2, "manifests": [descriptor(outer, "application/vnd.oci.image.index.v1+json")]}
    ).encode()
    assert pulled(f"oci:{write_files(tmp_path / 'x', files)}", site).image.record.digest == SMALL.digest


def test_an_image_for_another_processor_is_refused(tmp_path: Path, site: Site) -> None:
    archive = write_oci_archive(tmp_path / "app.tar", dataclasses.replace(SMALL, architecture="s390x"))
    with pytest.raises(PlatformMissing, match="is for linux/s390x") as caught:
        pulled(f"oci-archive:{archive}", site)
    assert "--platform linux/s390x" in caught.value.hint
    assert nothing_is_left(site)
    assert (
        pulled(f"oci-archive:{archive}", site, platform=platforms.parse("linux/s390x")).name == "localhost/app:latest"
    )


def test_a_name_of_choice(tmp_path: Path, site: Site) -> None:
    archive = write_oci_archive(tmp_path / "app.tar", SMALL)
    assert pulled(f"oci-archive:{archive}", site, name="tools/app:2").name == "docker.io/tools/app:2"
    assert Store.open(site.store).find("tools/app:2").record.digest == SMALL.digest
    with pytest.raises(ImageNotInStore):
        Store.open(site.store).find("localhost/app")


def test_another_file_of_the_same_name_is_not_taken_for_it(tmp_path: Path, site: Site) -> None:
    for place in ("one", "two"):
        write_oci_archive(tmp_path / place / "app.tar", SMALL)
    pulled(f"oci-archive:{tmp_path}/one/app.tar", site)
    with pytest.raises(ImageNotInStore):
        Store.open(site.store).find(f"oci-archive:{tmp_path}/two/app.tar")


# refusals


@pytest.mark.parametrize("repository", ["nothing/here:1", "hpc/known:2"])
def test_what_a_registry_has_not_is_said_so(registry: Registry, site: Site, repository: str) -> None:
    registry.push_image("hpc/known", "1", SMALL)
    with pytest.raises(RegistryFailed, match="has no .*manifest unknown"):
        pulled(f"{registry.address}/{repository}", site)


def test_credentials_of_dockers_file_are_used(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with Registry.start(tmp_path / "registry", user="alice", password="secret") as private:
        private.push_image("app", "1", SMALL)
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(RegistryFailed, match="wants credentials") as caught:
            pulled(f"{private.address}/app:1", site)
        assert "login" in caught.value.hint
        (tmp_path / ".docker").mkdir()
        config = tmp_path / ".docker/config.json"
        config.write_text(private.docker_config())
        assert pulled(f"{private.address}/app:1", site).image.record.digest == SMALL.digest
        config.write_text(dataclasses.replace(private, password="wrong").docker_config())
        with pytest.raises(RegistryFailed, match="does not take the credentials"):
            pulled(f"{private.address}/app:1", site)
        config.write_text("{")
        with pytest.raises(RegistryFailed, match="logging in failed"):
            pulled(f"{private.address}/app:1", site)


def test_a_registry_with_a_certificate_nobody_vouches_for_is_refused(tmp_path: Path, site: Site) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "cert")]
    subprocess.run(command, check=True, capture_output=True)
    with Registry.start(tmp_path / "r", certificate=tmp_path / "cert", key=tmp_path / "key") as private:
        with pytest.raises(RegistryFailed) as caught:
            pulled(f"{private.address}/app:1", site)
        assert "400" in str(caught.value) or "TLS" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [("127.0.0.1:1/x:1", "refuses connections"), ("registry.invalid/x:1", "there is no host registry.invalid")],
)
def test_a_registry_that_is_not_there_is_said_so(site: Site, text: str, says: str) -> None:
    with pytest.raises(RegistryFailed, match=says):
        pulled(text, site)


def test_a_damaged_blob_of_a_registry_is_not_published(tmp_path: Path, site: Site) -> None:
    with Registry.start(tmp_path / "registry") as own:
        own.push_image("app", "1", SMALL)
        layer = own.blob_file(digest_of(SMALL.blobs()[1][1]))
        content = bytearray(layer.read_bytes())
        content[len(content) // 2] ^= 1
        layer.write_bytes(content)
        with pytest.raises((ImageBroken, RegistryFailed)):
            pulled(f"{own.address}/app:1", site)
    assert nothing_is_left(site)


def broken_layout(tmp_path: Path, blob: bytes, *, diff_id: str = "", said: bytes | None = None) -> str:
    """A layout whose one layer is ``blob``; its manifest is about ``said`` when given."""
    config = json.dumps(
        {
            "os": "linux",
            "architecture": platforms.of_this_node().architecture,
            "rootfs": {"type": "layers", "diff_ids": [diff_id or digest_of(blob)]},
        }
    ).encode()
    layer = descriptor(blob if said is None else said, OCI_LAYER)
    manifest = json.dumps({"schemaVersion": 2, "config": descriptor(config, OCI_CONFIG), "layers": [layer]}).encode()
    files = {f"blobs/sha256/{digest_of(part)[7:]}": part for part in (config, manifest)}
    files["blobs/sha256/" + layer["digest"][7:]] = blob
    files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [descriptor(manifest, OCI_MANIFEST)]}).encode()
    return f"oci:{write_files(tmp_path / 'broken', files)}"


GOOD = tar(directory("d"), file("d/x", b"content" * 1000))


@pytest.mark.parametrize(
    ("blob", "diff_id", "says"),
    [
        (gzip.compress(GOOD)[:-20], digest_of(GOOD), "cut off"),
        (gzip.compress(GOOD)[:-6] + b"\0" * 6, digest_of(GOOD), "gzip"),
        (gzip.compress(GOOD) + b"junk", digest_of(GOOD), "gzip"),
        (compress(GOOD, "zstd")[:-10], digest_of(GOOD), "cut off|diff|digest"),
        (gzip.compress(GOOD), digest_of(b"other"), "has the digest"),
        (GOOD[:1024], digest_of(GOOD[:1024]), "cut off"),
        (b"this is no tar stream" * 100, "", "not a tar stream"),
        (b"BZh91AY&SY" + b"x" * 600, "", "bzip2"),
        (tar(file("a/../../etc/passwd", b"x")), "", r"'\.\.' in its path"),
        (tar(hardlink("l", "/etc/shadow")), "", "hard link l to /etc/shadow, which is nothing"),
        (tar(file("sparse", pax={"GNU.sparse.major": b"1"})), "", "sparse"),
    ],
)
def test_a_broken_layer_is_named_and_leaves_nothing(
    tmp_path: Path, site: Site, blob: bytes, diff_id: str, says: str
) -> None:
    with pytest.raises(ImageBroken, match=says):
        pulled(broken_layout(tmp_path, blob, diff_id=diff_id), site)
    assert nothing_is_left(site)


def test_a_blob_that_is_not_what_the_manifest_promises_is_refused(tmp_path: Path, site: Site) -> None:
    other = tar(directory("d"), file("d/x", b"CONTENT" * 1000))
    with pytest.raises(ImageBroken, match="promised is"):
        pulled(broken_layout(tmp_path, other, diff_id=digest_of(other), said=GOOD), site)
    assert nothing_is_left(site)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("index.json", None, "has no index.json"),
        ("index.json", b"{", "cannot be read"),
        ("index.json", b'{"manifests": []}', "has no image"),
        ("blobs/sha256/" + SMALL.digest[7:], None, "lacks blobs"),
        ("blobs/sha256/" + SMALL.digest[7:], b"{}", "promises"),
        ("blobs/sha256/" + digest_of(SMALL.blobs()[1][1])[7:], None, "lacks the blob"),
    ],
)
def test_an_incomplete_layout_is_named(tmp_path: Path, site: Site, name: str, content: bytes | None, says: str) -> None:
    layout = write_layout(tmp_path / "x", SMALL)
    if content is None:
        (layout / name).unlink()
    else:
        (layout / name).write_bytes(content)
    with pytest.raises((ImageBroken, NotAnImage), match=says):
        pulled(f"oci:{layout}", site)
    assert nothing_is_left(site)


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_an_archive_that_ends_early_is_named(tmp_path: Path, site: Site, kind: str, share: float) -> None:
    whole = tmp_path / "app.tar"
    if kind == "oci-archive":
        write_oci_archive(whole, busybox())
    else:
        write_docker_archive(whole, busybox())
    content = whole.read_bytes()
    whole.write_bytes(content[: int(len(content) * share)])
    with pytest.raises((ImageBroken, NotAnImage)):
        pulled(f"{kind}:{whole}", site)
    assert nothing_is_left(site)


def test_files_that_are_no_images_are_refused_by_name(tmp_path: Path, site: Site) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "plain.tar").write_bytes(tar(file("a", b"1")))
    os.mkfifo(tmp_path / "fifo")
    docker = write_docker_archive(tmp_path / "docker.tar", SMALL)
    oci = write_oci_archive(tmp_path / "oci.tar", SMALL)
    for text, says in {
        f"oci-archive:{tmp_path}/none": "no such file",
        f"oci-archive:{tmp_path}": "not a regular file",
        f"oci-archive:{tmp_path}/fifo": "not a regular file",
        f"oci:{tmp_path}/text": "not a directory",
        f"oci-archive:{tmp_path}/text": "cut off|tar stream",
        f"oci-archive:{tmp_path}/plain.tar": "no index.json",
        f"docker-archive:{tmp_path}/plain.tar": "no manifest.json",
        f"oci-archive:{docker}": "docker save",
        f"docker-archive:{oci}": "is an OCI archive",
    }.items():
        with pytest.raises((NotAnImage, ImageBroken), match=says):
            pulled(text, site)
    assert nothing_is_left(site)


# the writer


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounts a small tmpfs")
    archive = write_oci_archive(tmp_path / "app.tar", Image(layers=(tar(file("big", os.urandom(3 << 20))),)))
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=755", "tmpfs", str(small)], check=True)
    try:
        site = Site(store=str(small / "store"))
        with pytest.raises(StoreUnusable, match="no space left") as caught:
            pulled(f"oci-archive:{archive}", site)
        assert "free space" in caught.value.hint
        assert nothing_is_left(site)
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_pull_that_is_ended_leaves_nothing(tmp_path: Path, site: Site, number: signal.Signals) -> None:
    archive = write_oci_archive(
        tmp_path / "app.tar",
        Image(layers=(tar(*(file(f"f{n}", os.urandom(1 << 20)) for n in range(64))),), compression="none"),
    )
    code = f"""
        import sys, time
        from hpcctr.image.pull import pull
        from hpcctr.image.reference import ImageRef
        from hpcctr.site import Site
        def slow(progress):
            if progress.stage == "write":
                print("writing", flush=True)
                time.sleep(60)
        pull(ImageRef.parse({f"oci-archive:{archive}"!r}), site=Site(store={site.store!r}), progress=slow)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    child.send_signal(number)
    assert child.wait(timeout=30) == (-number if number == signal.SIGINT else 128 + number)
    child.stdout.close()
    assert nothing_is_left(site)


def writer_pid() -> int:
    """The one child of ours that writes an image file; it execs through what takes its rights away."""

    def find() -> list[int]:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text() == "tar2sqfs\n"]

    (pid,) = wait_until(find, what="a writer")
    return pid


def test_a_killed_writer_is_named_and_leaves_nothing(tmp_path: Path, site: Site) -> None:
    archive = write_oci_archive(
        tmp_path / "app.tar",
        Image(layers=(tar(*(file(f"f{n}", os.urandom(1 << 20)) for n in range(32))),), compression="none"),
    )
    killed: list[int] = []

    def kill_writer(progress: Progress) -> None:
        if progress.stage == "write" and not killed:
            killed.append(writer_pid())
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(ConversionFailed, match="killed by SIGKILL"):
        pulled(f"oci-archive:{archive}", site, progress=kill_writer)
    assert len(killed) == 1
    assert nothing_is_left(site)


@as_root
def test_the_writer_is_nobody_and_holds_nothing(tmp_path: Path, site: Site) -> None:
    archive = write_oci_archive(
        tmp_path / "app.tar",
        Image(layers=(tar(*(file(f"f{n}", os.urandom(1 << 20)) for n in range(32))),), compression="none"),
    )
    seen: dict[str, str] = {}

    def look(progress: Progress) -> None:
        if progress.stage == "write" and not seen:
            pid = writer_pid()
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            seen.update({name: value for name, _, value in (line.partition(":\t") for line in lines)})
            seen["net"] = str(os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net"))
            seen["fds"] = ",".join(sorted(os.listdir(f"/proc/{pid}/fd")))

    result = pulled(f"oci-archive:{archive}", site, progress=look)
    assert seen["Uid"] == seen["Gid"] == "\t".join(["65534"] * 4)
    assert seen["Groups"].strip() == ""
    assert {seen[field] for field in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert seen["NoNewPrivs"] == "1"
    assert seen["net"] == "True"
    assert len(seen["fds"].split(",")) <= 5
    assert Path(result.image.path).stat().st_uid == 0


@as_root
def test_an_ordinary_user_pulls_into_a_store_of_their_own_and_not_into_ours(place: Path, alice: User) -> None:
    archive = write_oci_archive(place / "app.tar", busybox())
    archive.chmod(0o644)
    Store.open(str(place / "ours"), writable=True)
    code = f"""
        import sys
        from hpcctr.errors import StoreUnusable
        from hpcctr.image.pull import pull
        from hpcctr.image.reference import ImageRef
        from hpcctr.image.store import Store
        from hpcctr.site import Site
        ref = ImageRef.parse({f"oci-archive:{archive}"!r})
        image = pull(ref, site=Site(store=sys.argv[1])).image
        print(image.record.file_digest, Store.open(sys.argv[1]).open_image_file(image) > 0)
        try:
            pull(ref, site=Site(store={str(place / "ours")!r}))
        except StoreUnusable as error:
            print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(alice.home / "store")],
        user=alice.uid,
        group=alice.gid,
        extra_groups=alice.groups,
        cwd="/",
        env={"PATH": os.environ["PATH"], "HOME": str(alice.home), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    first, second = run.stdout.splitlines() or [run.stderr, ""]
    digest, opened = first.split()
    assert opened == "True"
    assert "not writable for uid" in second
    # Nobody's identity is in the file: root's pull gives the same.
    assert pulled(f"oci-archive:{archive}", Site(store=str(place / "ours"))).image.record.file_digest == digest


# what is in the file


DEEP = "/".join(f"{number:03d}" for number in range(900))

STACKS: dict[str, list[list[Member]]] = {
    "replaced and removed": [
        [directory("d"), file("d/a", b"1"), file("d/b", b"1"), file("gone", b"1"), directory("e"), file("e/x", b"1")],
        [file("d/a", b"2"), whiteout("d/b"), whiteout("gone"), whiteout("e")],
        [directory("e"), file("e/y", b"3")],
    ],
    "opaque": [
        [directory("d"), file("d/old", b"1"), directory("d/sub"), file("d/sub/old", b"1")],
        [directory("d"), opaque("d"), file("d/new", b"2"), directory("d/sub"), file("d/sub/new", b"2")],
    ],
    "opaque last": [
        [directory("d"), file("d/old", b"1")],
        [directory("d"), file("d/new", b"2"), opaque("d")],
    ],
    "file, directory and symlink take each other's place": [
        [file("a", b"1"), directory("b"), file("b/x", b"1"), symlink("c", "a"), directory("t"), symlink("s", "t")],
        [directory("a"), file("a/x", b"2"), file("b", b"2"), file("c", b"2"), directory("s"), file("s/x", b"2")],
        [symlink("a", "b"), directory("c"), symlink("b", "c")],
    ],
    "hard links": [
        [file("a", b"1", mode=0o755), hardlink("b", "a"), directory("d"), hardlink("d/c", "b")],
        [file("a", b"2"), hardlink("d/e", "b")],
        [whiteout("b"), hardlink("f", "d/e")],
    ],
    "symlinked parents": [
        [
            directory("usr"),
            directory("usr/lib"),
            symlink("lib", "usr/lib"),
            symlink("abs", "/usr"),
            file("usr/lib/old", b"1"),
        ],
        [file("lib/x", b"2"), directory("lib/dir"), file("abs/lib/y", b"2"), whiteout("lib/old")],
        [hardlink("z", "lib/x"), symlink("lib/l", "../../../../../../etc")],
    ],
    "names": [
        [
            file(b"\xff\xfe\x80", b"1"),
            file(b"new\nline", b"1"),
            file("./dot", b"1"),
            file("/absolute", b"1"),
            directory("dir/"),
            file("d\u00e4\u00f6\u65e5\u672c", b"1"),
            file("n" * 255, b"1"),
            symlink("long link", "t/" * 1500 + "t"),
            file(b"dir/" + b"p" * 200, b"pax", long_names="pax"),
            file(b"dir/" + b"u" * 90 + b"/" + b"w" * 90, b"ustar", long_names="ustar"),
            file(b"caf\xe9", b"1", pax={"hdrcharset": b"BINARY", "path": b"caf\xe9-binary"}),
        ]
    ],
    "modes": [
        [
            file("setuid", b"1", mode=0o4755),
            file("setgid", b"1", mode=0o2711),
            file("secret", b"1", mode=0o600),
            file("program", b"1", mode=0o700),
            file("none", b"1", mode=0),
            file("open", b"1", mode=0o666),
            directory("closed", mode=0o700),
            directory("tmp", mode=0o1777),
            directory("open dir", mode=0o777),
            directory("setgid dir", mode=0o2775),
            character_device("null", 1, 3),
            fifo("fifo"),
            file("attributes", b"1", pax={"SCHILY.xattr.user.kept": b"\0\n=\xff", "SCHILY.xattr.trusted.gone": b"x"}),
        ]
    ],
    "depth": [[file(DEEP, b"deep")]],
    "empty": [[]],
    "empty layers between": [[file("a", b"1")], [], [file("b", b"2")]],
    "numbers": [
        [
            file("pax time", b"1", pax={"mtime": b"1234567890.987"}),
            file("owner", b"1", uid=2**31 + 5, gid=99999999),
            file("zero", b"", mtime=0),
            file("pax size", b"content", size=0, pax={"size": b"7"}),
        ]
    ],
}


def expected_mode(mode: int) -> int:
    """The rule of docs/store.md, for what umoci unpacked."""
    if stat.S_ISLNK(mode):
        return 0
    bits = stat.S_IMODE(mode)
    if stat.S_ISDIR(mode):
        return (bits & 0o1777 if bits & stat.S_ISVTX else bits & 0o755) | 0o555
    return bits & 0o755 | 0o444 | (0o111 if bits & 0o111 else 0)


def facts_of(root: Path, *, normalise: bool) -> dict[bytes, tuple[object, ...]]:
    """Every name below a root with type, mode, times, content, and the names it is one file with."""
    facts: dict[bytes, tuple[object, ...]] = {}
    together: dict[int, set[bytes]] = {}
    found: list[tuple[bytes, os.stat_result, bytes]] = []

    def walk(directory: int, prefix: bytes) -> None:
        for name in os.listdir(directory):
            raw = os.fsencode(name)
            status = os.stat(raw, dir_fd=directory, follow_symlinks=False)
            path = prefix + raw
            content = b""
            if stat.S_ISLNK(status.st_mode):
                content = os.fsencode(os.readlink(raw, dir_fd=directory))
            elif stat.S_ISREG(status.st_mode):
                descriptor = os.open(raw, os.O_RDONLY, dir_fd=directory)
                with open(descriptor, "rb") as opened:
                    content = opened.read()
            found.append((path, status, content))
            if stat.S_ISDIR(status.st_mode):
                inner = os.open(raw, os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
                # Deeper than the kernel takes paths, and than descriptors last: one level at a time.
                try:
                    walk(inner, path + b"/")
                finally:
                    os.close(inner)

    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        walk(top, b"")
    finally:
        os.close(top)
    for path, status, _ in found:
        if stat.S_ISREG(status.st_mode):
            together.setdefault(status.st_ino, set()).add(path)
    for path, status, content in found:
        kind = stat.S_IFMT(status.st_mode)
        if normalise and kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
            continue
        mode = (
            expected_mode(status.st_mode) if normalise else 0 if kind == stat.S_IFLNK else stat.S_IMODE(status.st_mode)
        )
        when = int(status.st_mtime) if kind == stat.S_IFREG else 0
        facts[path] = (kind, oct(mode), when, content, frozenset(together.get(status.st_ino, ())))
    return facts


@as_root
@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_the_file_holds_what_umoci_unpacks(tmp_path: Path, site: Site, name: str, compression: Compression) -> None:
    stack = STACKS[name]
    layers = tuple(tar(*members) for members in stack)
    gzipped = Image(layers=layers)
    write_layout(tmp_path / "umoci", gzipped, ref="x")
    subprocess.run(
        ["umoci", "unpack", "--image", f"{tmp_path}/umoci:x", str(tmp_path / "bundle")], check=True, capture_output=True
    )
    image = dataclasses.replace(gzipped, compression=compression)
    result = pulled(f"oci:{write_layout(tmp_path / 'ours', image)}", site)
    ours = facts_of(unpacked(result, tmp_path / "tree"), normalise=False)
    theirs = facts_of(tmp_path / "bundle/rootfs", normalise=True)
    assert ours == theirs
    assert result.image.record.entries == len(ours) + 1


def test_what_conversion_changes_is_counted(tmp_path: Path, site: Site) -> None:
    image = Image(layers=tuple(tar(*members) for members in STACKS["modes"]))
    changed = pulled(f"oci:{write_layout(tmp_path / 'x', image)}", site).image.record.changed
    assert (changed.setuid_bits, changed.device_nodes, changed.xattrs) == (3, 2, 1)
    # setgid file, secret, program, none, closed; open, open dir, setgid dir.
    assert (changed.made_readable, changed.write_bits) == (5, 3)


@as_root
def test_only_user_attributes_are_kept(tmp_path: Path, site: Site) -> None:
    image = Image(layers=tuple(tar(*members) for members in STACKS["modes"]))
    tree = unpacked(pulled(f"oci:{write_layout(tmp_path / 'x', image)}", site), tmp_path / "tree")
    assert os.listxattr(tree / "attributes") == ["user.kept"]
    assert os.getxattr(tree / "attributes", "user.kept") == b"\0\n=\xff"
    assert all(entry.stat(follow_symlinks=False).st_uid == 0 for entry in os.scandir(tree))


def test_errors_of_a_pull_say_what_to_do(tmp_path: Path) -> None:
    for store in ("/proc/store", str(tmp_path / "file")):
        (tmp_path / "file").write_text("")
        with pytest.raises(HpcctrError) as caught:
            pulled(f"oci:{write_layout(tmp_path / 'x', SMALL)}", Site(store=store))
        assert isinstance(caught.value, StoreUnusable)
        assert store in str(caught.value)
