"""Attacks on what containerd is told: an image that says every dangerous word there is, and requests that say them too.

What is read back is all there is: the record, the document on disk, the task, the command lines and environments of
shim, runtime and anchor. Whatever is in it and not in these tables fails.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grpc
import pytest

import hpcctr
from hpcctr.context import machine
from hpcctr.wire import ENGINE_SOCKET, Frame
from tests.support import oci
from tests.support.mountinfo import read_mountinfo
from tests.support.node import Node, node
from tests.support.polling import wait_until
from tests.support.processes import Process
from tests.support.scratch import scratch
from tests.support.users import User
from tests.support.values import the_document
from tests.unit.containerd.test_client import fields

pytestmark = [pytest.mark.root, pytest.mark.containerd]

IMAGE = "localhost/words:1"
#: In every word of the image and of the requests that is to be found nowhere.
MARK = "evilword"
#: Stands for the program that would leave a file behind if anything ran it.
TRAP = "/TRAP"
#: Keys that containerd, its shims, runc, crun, systemd, CRIU, CDI or NVIDIA's runtime obey in labels, annotations or
#: variables.
OBEYED = {
    "containerd.io/restart.status": "running",
    "containerd.io/restart.loguri": f"binary://{TRAP}?{MARK}=1",
    "containerd.io/restart.logpath": f"/etc/{MARK}",
    "containerd.io/restart.policy": "always",
    "containerd.io/gc.root": MARK,
    "containerd.io/gc.ref.content.0": MARK,
    "containerd.io/gc.expire": "1970-01-01T00:00:00Z",
    "containerd.io/snapshot.ref": MARK,
    "containerd.io/defaults/runtime": TRAP,
    "containerd.io/namespace.shareable": "true",
    "io.containerd.image.config.stop-signal": MARK,
    "io.containerd.runc.v2.group": MARK,
    "io.kubernetes.cri.sandbox-id": MARK,
    "io.kubernetes.cri.container-type": "sandbox",
    "io.kubernetes.cri.untrusted-workload": "true",
    "io.cri-containerd.kind": "container",
    "nerdctl/log-uri": f"binary://{TRAP}",
    "nerdctl/extraHosts": MARK,
    "cdi.k8s.io/x": f"{MARK}.com/class=all",
    "org.criu.config": f"/{MARK}",
    "org.systemd.property.ExecStopPost": f"'{TRAP}'",
    "run.oci.handler": MARK,
    "run.oci.hooks.stdout": f"/etc/{MARK}",
    "run.oci.hooks.stderr": f"/etc/{MARK}",
    "run.oci.seccomp.receiver": f"/{MARK}",
    "run.oci.seccomp.plugins": MARK,
    "run.oci.pidfd_receiver": f"/{MARK}",
    "run.oci.keep_original_groups": "1",
    "run.oci.delegate-cgroup": MARK,
    "run.oci.systemd.subgroup": MARK,
    "run.oci.mount_context_type": MARK,
    "run.oci.timens_offset": "1",
    "hpcctr.uid": "0",
    "hpcctr.key": "0" * 32,
    "hpcctr.owner": MARK,
    "hpcctr.digest": "sha256:" + "0" * 64,
    MARK: MARK,
}
ENVIRONMENT = (
    "PATH=/bin",
    f"NVIDIA_VISIBLE_DEVICES={MARK}",
    f"NVIDIA_DRIVER_CAPABILITIES={MARK}",
    f"LISTEN_FDS={MARK}",
    f"NOTIFY_SOCKET=/{MARK}",
    f"_LIBCONTAINER_INITPIPE={MARK}",
    f"_LIBCONTAINER_STATEDIR=/{MARK}",
    f"TTRPC_ADDRESS=/{MARK}",
    f"GRPC_ADDRESS=/{MARK}",
    f"CONTAINERD_NAMESPACE={MARK}",
    f"HPCCTR_SITE=/{MARK}",
    f"LD_PRELOAD=/{MARK}.so",
    f"PYTHONPATH=/{MARK}",
    f"GODEBUG={MARK}",
    f"GOMAXPROCS={MARK}",
)


def _layout(place: Path, trap: Path) -> Path:
    """An OCI layout whose index, manifest, config and descriptors all carry the words."""
    said = {key: value.replace(TRAP, str(trap)) for key, value in OBEYED.items()}
    layer = oci.tar(*oci.busybox_members())
    config = json.dumps(
        {
            "os": "linux",
            "architecture": machine(),
            "author": MARK,
            "config": {
                "User": f"{MARK}:0",
                "Env": list(ENVIRONMENT),
                "Entrypoint": [],
                "Cmd": [str(trap), MARK],
                "WorkingDir": f"/proc/self/fd/7/{MARK}",
                "Labels": said,
                "Volumes": {f"/etc/{MARK}": {}, "/": {}, "/run/hpcctr": {}},
                "ExposedPorts": {f"22/{MARK}": {}},
                "StopSignal": MARK,
                "Healthcheck": {"Test": ["CMD", str(trap)], "Interval": 1},
                "OnBuild": [f"RUN {trap}"],
                "Shell": [str(trap)],
                "ArgsEscaped": True,
                "MacAddress": MARK,
                "NetworkDisabled": True,
                "Hostname": MARK,
                "Domainname": MARK,
                "Memory": -1,
                "CpuShares": -1,
                "hooks": {"createRuntime": [{"path": str(trap)}]},
                "annotations": said,
            },
            "container_config": {"Cmd": [str(trap)], "Labels": said},
            "hooks": {"createRuntime": [{"path": str(trap)}]},
            "linux": {"namespaces": [], "seccomp": {"listenerPath": f"/{MARK}"}},
            "annotations": said,
            "rootfs": {"type": "layers", "diff_ids": [oci.digest_of(layer)]},
            "history": [{"created_by": str(trap), "comment": MARK, "author": MARK}],
        }
    ).encode()
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": oci.OCI_MANIFEST,
            "artifactType": MARK,
            "config": oci.descriptor(config, oci.OCI_CONFIG, annotations=said),
            "layers": [oci.descriptor(layer, oci.OCI_LAYER, annotations=said)],
            "annotations": said,
        }
    ).encode()
    top = oci.descriptor(manifest, oci.OCI_MANIFEST, annotations=said, artifactType=MARK)
    index = {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": [top], "annotations": said}
    blobs = {f"blobs/{oci.digest_of(blob).replace(':', '/')}": blob for blob in (layer, config, manifest)}
    return oci.write_files(place, {"oci-layout": b"{}", "index.json": json.dumps(index).encode(), **blobs})


@dataclass(frozen=True, kw_only=True)
class Running:
    """A program of the image, and what was built for it."""

    node: Node
    user: User
    runtime: str
    container_id: str
    digest: str
    #: Exists as soon as anything has run the trap.
    sprung: Path
    trap: Path

    @property
    def bundle(self) -> Path:
        state = self.node.containerd.directory / "state"
        return state / "io.containerd.runtime.v2.task/hpcctr" / self.container_id

    @property
    def anchor(self) -> int:
        return int((self.bundle / "init.pid").read_text())

    def document(self) -> dict[str, Any]:
        """The only document there may be."""
        user = self.user
        gids = sorted({user.gid, *user.groups})
        return the_document(uid=user.uid, gid=user.gid, gids=gids, container_id=self.container_id)


@pytest.fixture(scope="module", params=["runc", "crun"])
def running(request: pytest.FixtureRequest, alice: User) -> Iterator[Running]:
    runtime: Literal["runc", "crun"] = request.param
    with scratch("words") as place, node(place, runtime=runtime, cgroup2_only=runtime == "crun") as made:
        trap, sprung = place / "trap", place / "sprung"
        trap.write_text(f"#!/bin/sh\nid > {sprung}\n")
        trap.chmod(0o755)
        made.hpcctr("pull", "--name", IMAGE, f"oci:{_layout(place / 'layout', trap)}")
        target = "/data,upperdir=/etc,lowerdir=/,redirect_dir=on"
        with made.held(IMAGE, user=alice, flags=["-v", f"/usr/share:{target}"]):
            (container_id,) = made.containerd.containers()
            (image,) = (made.site.store / "images").iterdir()
            yield Running(
                node=made,
                user=alice,
                runtime=runtime,
                container_id=container_id,
                digest=image.name.replace("-", ":", 1),
                sprung=sprung,
                trap=trap,
            )


def _without_empty(value: Any) -> Any:
    """What is not there, not set, and empty are one thing to containerd, and printed differently by its versions."""
    if isinstance(value, dict):
        kept = {key: _without_empty(inner) for key, inner in value.items()}
        return {key: inner for key, inner in kept.items() if inner not in ("", None, [], {})}
    return [_without_empty(inner) for inner in value] if isinstance(value, list) else value


def test_the_record_in_containerd_is_the_engines_whatever_the_image_says(running: Running) -> None:
    record = json.loads(running.node.containerd.ctr("containers", "info", running.container_id))
    assert record.pop("CreatedAt") and record.pop("UpdatedAt")
    runtime = record.pop("Runtime")
    assert runtime["Name"] == "io.containerd.runc.v2"
    assert bool(runtime["Options"]) == (running.runtime == "crun")
    assert _without_empty(record) == _without_empty(
        {
            "ID": running.container_id,
            "Labels": {
                "hpcctr.key": running.container_id.partition("-")[0],
                "hpcctr.uid": str(running.user.uid),
                "hpcctr.digest": running.digest,
                "hpcctr.owner": "gateway",
            },
            "Spec": running.document(),
        }
    )


def test_the_document_the_runtime_reads_is_the_engines_to_the_last_field(running: Running) -> None:
    assert json.loads((running.bundle / "config.json").read_bytes()) == running.document()


def test_the_shim_is_told_of_no_option_but_the_sites_runtime(running: Running) -> None:
    options = json.loads((running.bundle / "options.json").read_bytes())
    assert options == ({"binary_name": "crun"} if running.runtime == "crun" else {})
    assert (running.bundle / "shim-binary-path").read_text() == "/usr/bin/containerd-shim-runc-v2"


def test_the_task_has_no_stdio_and_its_anchor_holds_null(running: Running) -> None:
    with grpc.insecure_channel(f"unix:{running.node.containerd.socket}") as channel:
        get = channel.unary_unary("/containerd.services.tasks.v1.Tasks/Get")
        container_id = running.container_id.encode()
        answer = get(
            b"\x0a" + bytes([len(container_id)]) + container_id,
            metadata=[("containerd-namespace", "hpcctr")],
            timeout=10,
        )
    process = fields(answer)[1][0]
    assert isinstance(process, bytes)
    # containerd's task.proto: 2 id, 3 pid, 4 status, 10 exited_at; 5 to 7 are stdin, stdout and stderr, 8 a terminal.
    assert fields(process).keys() <= {2, 3, 4, 10}
    assert fields(process)[3] == [running.anchor]
    for number in (0, 1, 2):
        assert os.readlink(f"/proc/{running.anchor}/fd/{number}") == "/dev/null"


def test_no_process_of_roots_and_no_anchor_has_a_word_of_the_image(running: Running) -> None:
    seen = []
    for process in running.node.host.processes():
        if process.uid != running.user.uid or process.pid == running.anchor:
            place = Path(f"/proc/{process.pid}")
            said = (place / "cmdline").read_bytes() + (place / "environ").read_bytes() + (place / "comm").read_bytes()
            assert MARK.encode() not in said and str(running.trap).encode() not in said, process
            seen.append(process.name)
    assert {"containerd", "containerd-shim"} <= set(seen)
    anchor = Process.read(running.anchor)
    assert Process.read(anchor.ppid).name == "containerd-shim"


def test_containerd_keeps_nothing_of_the_image(running: Running) -> None:
    for what in (["images", "list", "-q"], ["content", "list", "-q"], ["leases", "list", "-q"]):
        assert running.node.containerd.ctr(*what) == "", what
    assert running.node.containerd.ctr("snapshots", "list").splitlines()[1:] == []
    (line,) = [line for line in running.node.containerd.ctr("namespaces", "list").splitlines() if "hpcctr" in line]
    assert line.split() == ["hpcctr"]


def test_the_root_is_the_overlay_the_engine_described_and_no_word_of_a_target_changes_it(running: Running) -> None:
    (root,) = [mount for mount in read_mountinfo(Path(f"/proc/{running.anchor}/mountinfo")) if mount.target == "/"]
    line = next(line for line in Path(f"/proc/{running.anchor}/mountinfo").read_text().splitlines() if " / / " in line)
    options = dict(option.partition("=")[::2] for option in line.split()[-1].split(","))
    assert root.kind == "overlay"
    state = "/run/hpcctr/state"
    assert options["upperdir"] == f"{state}/containers/{running.container_id}/upper"
    assert options["workdir"] == f"{state}/containers/{running.container_id}/work"
    assert Path(options["lowerdir"]).parent == Path(f"{state}/images")
    assert options.get("redirect_dir", "nofollow") == "nofollow"
    assert options.get("metacopy", "off") == "off"


def test_the_shims_socket_is_a_file_of_roots_and_none_is_abstract(running: Running, alice: User) -> None:
    """Programs share the node's network namespace, and abstract sockets with it (CVE-2020-15257)."""
    address = (running.bundle / "address").read_text()
    path = running.node.host.path(address.removeprefix("unix://"))
    assert path.is_socket() and path.stat().st_uid == 0
    assert not [line for line in Path("/proc/net/unix").read_text().splitlines() if "@" in line and "shim" in line]
    code = "import socket, sys; s = socket.socket(socket.AF_UNIX); print(s.connect_ex(sys.argv[1]))"
    for socket_path in (address.removeprefix("unix://"), str(running.node.containerd.socket)):
        done = running.node.host.run(["/usr/bin/python3", "-c", code, socket_path], user=alice)
        assert done.stdout == b"13\n", socket_path  # EACCES


#: Fields of containerd's messages, of the OCI document and of options that are root's to say.
WORDS = """
 runtime runtime-name runtime-options options binary-name root criu-path criu-image-path criu-work-path shim-cgroup
 no-pivot-root no-new-keyring io-uid io-gid systemd-cgroup task-api-address task-api-version id container-id labels
 label snapshotter snapshot-key sandbox sandbox-id extensions extension spec hooks hook root-path mount mounts user uid
 gid groups additional-gids capabilities no-new-privileges apparmor-profile selinux-label rlimits oom-score-adj
 scheduler io-priority namespaces namespace uid-mappings gid-mappings devices resources unified cgroups-path sysctl
 seccomp listener-path masked-paths readonly-paths rootfs-propagation mount-label intel-rdt personality net-devices
 memory-policy time-offsets annotations annotation runtime-path rootfs lowerdir upperdir stdin stdout stderr terminal
 checkpoint restore-from-path args env cwd command entrypoint image-path store enter state owner key digest rule policy
 volume source target-source name containerd-namespace containerd-lease user-agent pid verb
"""
FIELDS = WORDS.split()
CLIENT = f"""
import socket, sys
sys.path.insert(0, sys.argv[1])
from hpcctr.wire import Frame
for field in sys.argv[2:]:
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.connect({ENGINE_SOCKET!r})
    s.send(Frame("run", [("image", {IMAGE!r}.encode()), (field, b"{MARK}")]).pack())
    packet, descriptors, _, _ = socket.recv_fds(s, 65536, 4)
    answer = Frame.unpack(packet)
    print(field, answer.verb, answer.one("slug", b"").decode(), len(descriptors))
    s.close()
"""


def test_no_field_of_containerds_can_be_said_in_a_request(running: Running, alice: User) -> None:
    before = running.node.containerd.created()
    packages = str(Path(hpcctr.__file__).parents[1])
    done = running.node.host.run(["/usr/bin/python3", "-c", CLIENT, packages, *FIELDS], user=alice)
    assert done.stdout.decode().splitlines() == [f"{field} error protocol 0" for field in FIELDS]
    assert running.node.containerd.created() == before


@pytest.mark.parametrize("field", ["containerd.io/restart.loguri", "Runtime", "run_oci", "io.containerd.runc.v2.group"])
def test_a_key_with_a_dot_a_capital_or_a_slash_makes_no_frame(running: Running, alice: User, field: str) -> None:
    packet = f"hpcctr/1 run\0image={IMAGE}\0{field}={MARK}\0".encode()
    code = (
        "import socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); "
        f"s.connect({ENGINE_SOCKET!r}); s.send({packet!r}); print(s.recv(65536))"
    )
    said = running.node.host.run(["/usr/bin/python3", "-c", code], user=alice).stdout
    assert b"slug=protocol" in said and b"has no name" in said


@pytest.mark.parametrize(
    "image",
    [
        f"binary:///{MARK}",
        f"file:///etc/{MARK}",
        f"/usr/bin/{MARK}",
        "../images/x",
        f"localhost/{MARK},upperdir=/etc:1",
        'localhost/x:1"==""',
        "sha256:" + "0" * 64 + f"?{MARK}",
    ],
)
def test_an_image_name_that_is_a_word_of_containerds_is_no_image(running: Running, alice: User, image: str) -> None:
    before = running.node.containerd.created()
    packet = Frame("run", [("image", image.encode())]).pack()
    code = (
        "import socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); "
        f"s.connect({ENGINE_SOCKET!r}); s.send({packet!r}); print(s.recv(65536))"
    )
    said = running.node.host.run(["/usr/bin/python3", "-c", code], user=alice).stdout
    assert b"hpcctr/1 error" in said and b"slug=image-name" in said, said
    assert running.node.containerd.created() == before


def test_nothing_has_run_what_the_image_names_not_even_after_a_restart(running: Running) -> None:
    """Last in this file: containerd's restart monitor looks at labels when it starts, and every ten seconds."""
    running.node.containerd.restart()
    wait_until(lambda: running.node.containerd.tasks() == {running.container_id: "CREATED"}, what="the task again")
    assert running.node.run(IMAGE, "sh", "-c", "id -u", user=running.user).stdout == b"%d\n" % running.user.uid
    assert not running.sprung.exists()
    # And it is a trap.
    subprocess.run([running.trap], check=True)
    assert running.sprung.read_text().startswith("uid=0")
