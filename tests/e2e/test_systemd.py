"""The shipped units under a real systemd: everything works with exactly what they give, and each option that is left
out, and each capability that is not, has its reason shown.

The manager is the one of root's own session (tests/support/systemd.py): every option is applied by systemd itself, and
users' programs are where they always are.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hpcctr.engine.rights import NEEDED
from tests.support import images
from tests.support.engine import HPCCTR, SOCKET
from tests.support.host import CommandFailed, Host
from tests.support.node import Node, equipped
from tests.support.oci import busybox, file, tar, write_oci_archive
from tests.support.polling import wait_until
from tests.support.processes import processes
from tests.support.registry import Registry
from tests.support.scratch import scratch
from tests.support.systemd import Systemd
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

UNITS = Path(__file__).parents[2] / "etc/systemd"
DOCUMENT = Path(__file__).parents[2] / "docs/install.md"
SERVICE = "hpcctr-engine.service"
DROP_IN = f"{SERVICE}.d/50-test.conf"
OWNER = 61950
#: systemd's measure, times ten: 58 with systemd 252.
EXPOSURE = 60
#: What the service must not get a mount namespace from.
OWN_MOUNTS = (
    "PrivateTmp=yes",
    "PrivateDevices=yes",
    "PrivateMounts=yes",
    "PrivateIPC=yes",
    "ProtectSystem=full",
    "ProtectHome=yes",
    "ProtectKernelTunables=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelLogs=yes",
    "ProtectControlGroups=yes",
    "ProtectProc=invisible",
    "ProcSubset=pid",
    "ReadOnlyPaths=/usr",
    "InaccessiblePaths=/boot",
    "NoExecPaths=/home",
    "BindReadOnlyPaths=/usr",
    "TemporaryFileSystem=/mnt",
    "MountFlags=slave",
)
# The engine without its own check at the start: what follows shows what the check is for.
_UNCHECKED = (
    "from hpcctr.engine import rights; rights.require_capabilities = lambda: None; "
    "import sys; sys.argv[0] = 'hpcctr'; from hpcctr.__main__ import main; sys.exit(main())"
)


@dataclass(kw_only=True)
class Installed:
    """A node whose engine is systemd's, and everything its users do."""

    node: Node
    systemd: Systemd
    registry: Registry
    alice: User
    bob: User
    log_file: Path
    archive: Path
    _number: int = field(default=0)

    @property
    def host(self) -> Host:
        return self.node.host

    def set(self, *options: str) -> None:
        """The unit with further options of [Service], by a drop-in; the engine starts with the next caller."""
        self.systemd.ctl("stop", SERVICE)
        self.systemd.write(DROP_IN, "\n".join(["[Service]", *options, ""]) if options else "")
        self.log_file.write_text("")

    def fresh(self) -> int:
        """A number no function has used, so that nothing is there already."""
        self._number += 1
        return self._number

    # what users do

    def run(self) -> None:
        """In a container that is built for it."""
        number = self.fresh()
        image, targets = images.busybox(), ["-v", f"/var:/new{number}"]
        done = self.node.run(image, "cat", "/proc/self/status", user=self.alice, flags=targets)
        status = dict(line.split(":\t", 1) for line in done.stdout.decode().splitlines())
        assert (status["Seccomp"], status["CapEff"]) == ("0", "0" * 16)
        mine = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
        assert status["CapBnd"] == mine["CapBnd"]

    def exec(self) -> None:
        words = ["run", images.busybox(), "--", "sh", "-c", "echo; exec cat"]
        process = self.node.popen(*words, user=self.alice, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        try:
            self.node.hpcctr("exec", str(process.pid), "--", "true", user=self.alice)
        finally:
            process.communicate(timeout=20)

    def pull(self, *before: str) -> None:
        """An image nobody has; ``before`` goes before the command, which root starts then."""
        image = self._offered()
        if not before:
            self.node.hpcctr("pull", image, user=self.alice)
            return
        setpriv = ["setpriv", f"--reuid={self.alice.uid}", f"--regid={self.alice.gid}", "--clear-groups"]
        command = [*before, *setpriv, "--inh-caps=-all", "env", f"HOME={self.alice.home}", str(HPCCTR), "pull", image]
        self.host.run(command, env=self.node.environment())

    def _offered(self) -> str:
        number = self.fresh()
        self.registry.push_image(f"app{number}", "1", busybox(layers=[tar(file("etc/n", b"%d" % number))]))
        return f"{self.registry.address}/app{number}:1"

    def pull_from_a_cgroup_of_ones_own(self) -> None:
        """As in the session of a user whose manager is a user's (systemd, Delegate=)."""
        cgroup = f"/sys/fs/cgroup/{self.host.root.name}-{self.fresh()}"
        directory = self.host.path(cgroup)
        directory.mkdir()
        for path in (directory, directory / "cgroup.procs"):
            os.chown(path, self.alice.uid, self.alice.gid)
        try:
            self.pull("sh", "-c", f'echo 0 >{cgroup}/cgroup.procs && exec "$@"', "sh")
        finally:
            wait_until(lambda: "populated 0" in (directory / "cgroup.events").read_text())
            directory.rmdir()

    def pull_favoured(self) -> None:
        """As a user whose processes a site prefers."""
        self.pull("nice", "-n", "-5")

    def import_and_share(self) -> None:
        name = f"localhost/own{self.fresh()}:1"
        self.node.hpcctr("pull", "--name", name, f"oci-archive:{self.archive}", user=self.alice)
        self.node.run(name, "true", user=self.alice)
        self.node.hpcctr("share", name, "--user", self.bob.name, user=self.alice)
        self.node.run(f"@{self.alice.name}/{name}", "true", user=self.bob)
        assert name in self.node.hpcctr("images", "--mine", user=self.alice).stdout.decode()
        self.node.hpcctr("rm", name, user=self.alice)

    def with_host_features(self) -> None:
        """A device of CDI's with a file and a link, and a profile with a directory of the node's."""
        flags = ["--device", "kernel.org/misc=fuse", "--feature", "zone"]
        script = "cat /opt/driver/libx.so && ls /usr/share/zoneinfo/UTC"
        done = self.node.run(images.busybox(), "sh", "-c", script, user=self.alice, flags=flags)
        assert done.stdout.decode() == "a driver's\n/usr/share/zoneinfo/UTC\n"

    def cleanup(self) -> None:
        self.node.hpcctr("cleanup")
        assert self.node.containerd.containers() == ()
        assert not [mount for mount in self.host.mounts() if mount.kind == "squashfs"]

    def end_a_storekeeper(self) -> None:
        """One that stands still when nobody wants its work any more."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            image = f"127.0.0.1:{silent.getsockname()[1]}/app:1"
            client = self.node.popen(
                "pull", image, user=self.alice, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            engine = wait_until(lambda: self.systemd.main_pid(SERVICE))

            def keepers() -> list[int]:
                return [one.pid for one in processes() if (one.ppid, one.uid) == (engine, OWNER)]

            keeper = wait_until(keepers)[0]
            os.kill(keeper, signal.SIGSTOP)
            client.kill()
            client.wait(20)
            try:
                # Its session is over when it has ended, or the kernel has refused the signal.
                wait_until(lambda: _is_pending(keeper, signal.SIGTERM) or " left uid=" in self.log_file.read_text())
                assert _is_pending(keeper, signal.SIGTERM), "the engine may not signal it"
            finally:
                os.kill(keeper, signal.SIGKILL)


def _is_pending(pid: int, number: signal.Signals) -> bool:
    (pending,) = re.findall(r"^ShdPnd:\t([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(pending, 16) >> number - 1 & 1)


@pytest.fixture(scope="module")
def installed(alice: User, bob: User) -> Iterator[Installed]:
    with (
        scratch("systemd") as root,
        Host.start(root) as host,
        Systemd.start(host) as systemd,
        equipped(host, linger_seconds=600, more=f'[cdi]\ndirectories = ["{root}/cdi"]\n') as node,
        Registry.start(root / "registry") as registry,
    ):
        node.pull(images.busybox())
        for directory, _, names in os.walk(node.site.store):
            for name in ("", *names):
                os.chown(Path(directory) / name, OWNER, OWNER)
        _describe_hardware(root)
        desk = root / "desk"
        desk.mkdir(mode=0o700)
        archive = write_oci_archive(desk / "app.tar", busybox(layers=[tar(file("etc/edition", b"own"))]))
        for path in (desk, archive):
            os.chown(path, alice.uid, alice.gid)
        # The images are read as a whole before they are mounted: that is the most the engine may be asked for.
        node.site.file.write_text(f"verify-at-mount = true\n{node.site.file.read_text()}")
        node.engine.stop()
        host.path(SOCKET).unlink()
        log = root / "unit.log"
        for unit in UNITS.iterdir():
            systemd.write(unit.name, _at(node, unit.read_text()))
        # There is no journal.
        systemd.write(f"{SERVICE}.d/10-log.conf", f"[Service]\nStandardError=append:{log}\n")
        systemd.ctl("start", "hpcctr-engine.socket")
        yield Installed(
            node=node, systemd=systemd, registry=registry, alice=alice, bob=bob, log_file=log, archive=archive
        )


def _describe_hardware(root: Path) -> None:
    for name in ("cdi", "profiles.d", "drivers"):
        (root / name).mkdir(mode=0o755)
    root.chmod(0o755)
    library = root / "drivers/libx.so.1"
    library.write_text("a driver's\n")
    edits = {
        "deviceNodes": [{"path": "/dev/fuse"}],
        "mounts": [{"hostPath": str(library), "containerPath": "/opt/driver/libx.so.1", "options": ["ro", "bind"]}],
        "hooks": [
            {
                "hookName": "createContainer",
                "path": "/usr/bin/nvidia-cdi-hook",
                "args": ["nvidia-cdi-hook", "create-symlinks", "--link", "libx.so.1::/opt/driver/libx.so"],
            }
        ],
    }
    document = {
        "cdiVersion": "0.5.0",
        "kind": "kernel.org/misc",
        "devices": [{"name": "fuse", "containerEdits": edits}],
    }
    (root / "cdi/fuse.json").write_text(json.dumps(document))
    (root / "profiles.d/zone.toml").write_text('directories = ["/usr/share/zoneinfo"]\n')


def _at(node: Node, unit: str) -> str:
    """The unit's text for the program and the site of the tests: both are an administrator's to set."""
    serve = "/opt/hpcctr/bin/hpcctr engine serve"
    return unit.replace(serve, f"{HPCCTR} engine serve --site {node.site.file}")


@pytest.fixture
def unit(installed: Installed) -> Iterator[Installed]:
    """As shipped, before a test and after it."""
    installed.set()
    yield installed
    installed.set()


def _analyzed(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    for unit in UNITS.iterdir():
        # verify wants the program to exist.
        (place / unit.name).write_text(unit.read_text().replace("/opt/hpcctr/bin/hpcctr", str(HPCCTR)))
    return subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, check=False, cwd=place)


def test_systemd_finds_no_fault_with_the_units(place: Path) -> None:
    done = _analyzed(place, "verify", "--man=no", "./hpcctr-engine.service", "./hpcctr-engine.socket")
    complaints = [line for line in done.stderr.splitlines() if "hpcctr-engine" in line]
    # containerd.service belongs to another package and is not looked at here.
    assert [line for line in complaints if "containerd.service" not in line] == []


def test_systemd_measures_no_more_exposure_than_is_documented(place: Path) -> None:
    done = _analyzed(
        place, "security", "--offline=yes", "--no-pager", f"--threshold={EXPOSURE}", "./hpcctr-engine.service"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exposure level for hpcctr-engine.service" in done.stdout


def test_everything_works_with_the_unit(unit: Installed) -> None:
    unit.run()
    unit.exec()
    unit.with_host_features()
    unit.pull()
    unit.import_and_share()
    unit.pull_from_a_cgroup_of_ones_own()
    unit.pull_favoured()
    unit.end_a_storekeeper()
    unit.cleanup()
    # Nothing failed that a caller was not told of.
    log = unit.log_file.read_text()
    assert "listening on" in log
    assert "Traceback" not in log and "not permitted" not in log, log


def test_the_engine_has_what_the_unit_says_and_the_nodes_mounts(unit: Installed) -> None:
    unit.run()
    pid = unit.systemd.main_pid(SERVICE)
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    needed = f"{sum(1 << bit for bit, _ in NEEDED.values()):016x}"
    assert (status["CapBnd"], status["CapEff"], status["NoNewPrivs"], status["Seccomp"]) == (needed, needed, "1", "2")
    for name in ("mnt", "uts", "net", "ipc", "pid", "user"):
        assert os.readlink(f"/proc/{pid}/ns/{name}") == os.readlink(f"/proc/{unit.host.holder.pid}/ns/{name}")


#: What fails without each capability, and how.
_WITHOUT: tuple[tuple[str, Callable[[Installed], None], str], ...] = (
    ("CAP_DAC_OVERRIDE", Installed.pull_from_a_cgroup_of_ones_own, "Permission denied: '/sys/fs/cgroup/"),
    ("CAP_KILL", Installed.end_a_storekeeper, "the engine may not signal it"),
    ("CAP_SETGID", Installed.run, "cannot act as the store's owner"),
    ("CAP_SETUID", Installed.run, "cannot act as the store's owner"),
    ("CAP_SETPCAP", Installed.import_and_share, "PR_CAPBSET_DROP"),
    ("CAP_SYS_PTRACE", Installed.run, "ns/user cannot be read: Permission denied"),
    ("CAP_SYS_ADMIN", Installed.run, "Operation not permitted"),
    ("CAP_SYS_NICE", Installed.pull_favoured, "the storekeeper cannot start: [Errno 13]"),
)


@pytest.mark.parametrize(("name", "use", "consequence"), _WITHOUT)
def test_without_this_capability_something_fails(
    unit: Installed, name: str, use: Callable[[Installed], None], consequence: str
) -> None:
    python = HPCCTR.parent / "python"
    unit.set(
        f"CapabilityBoundingSet=~{name}",
        "ExecStart=",
        f'ExecStart={python} -I -c "{_UNCHECKED}" engine serve --site {unit.node.site.file}',
    )
    with pytest.raises(AssertionError, match=re.escape(consequence)):
        use(unit)


def test_an_engine_without_a_capability_names_it_and_does_not_start(unit: Installed) -> None:
    unit.set("CapabilityBoundingSet=~CAP_SYS_PTRACE CAP_KILL", "Restart=no")
    unit.systemd.ctl("start", SERVICE, check=1)
    assert "error[capabilities]: the engine was started without CAP_KILL, CAP_SYS_PTRACE (" in unit.log_file.read_text()
    unit.systemd.ctl("reset-failed", SERVICE)


def test_the_capabilities_shown_to_be_needed_are_all() -> None:
    assert {name for name, _, _ in _WITHOUT} == set(NEEDED)


def test_these_options_give_a_service_mounts_of_its_own(unit: Installed) -> None:
    ours = os.readlink(f"/proc/{unit.host.holder.pid}/ns/mnt")
    names = []
    for number, option in enumerate(OWN_MOUNTS):
        names.append(f"own{number}.service")
        (unit.host.path("/run/systemd-units") / names[-1]).write_text(f"[Service]\nExecStart=sleep 60\n{option}\n")
    unit.systemd.ctl("daemon-reload")
    unit.systemd.ctl("start", *names, check=False)
    for name, option in zip(names, OWN_MOUNTS, strict=True):
        shown = unit.systemd.show(name, "MainPID", "ExecMainStatus")
        if shown["MainPID"] == "0":
            # 226: it could not make the namespace (systemd.exec(5)), as on a machine that lacks what it would cover.
            assert shown["ExecMainStatus"] == "226", (option, shown)
        else:
            assert os.readlink(f"/proc/{shown['MainPID']}/ns/mnt") != ours, option
    unit.systemd.ctl("stop", *names)


def test_an_engine_with_mounts_of_its_own_says_so_and_launches_nothing(unit: Installed) -> None:
    # What these options do under pid 1. A manager of users may add a user namespace, which is another fault.
    serve = f"{HPCCTR} engine serve --site {unit.node.site.file}"
    unit.set("ExecStart=", f"ExecStart=unshare --mount --propagation slave {serve}")
    with pytest.raises(CommandFailed, match=r"error\[no-containerd\].* is in another mount namespace"):
        unit.run()
    assert "is in another mount namespace than this process" in unit.log_file.read_text()


@pytest.mark.parametrize(
    ("option", "use", "consequence"),
    [
        ("RestrictSUIDSGID=yes", Installed.run, "cannot be looked up in the image: Function not implemented"),
        ("RestrictNamespaces=yes", Installed.import_and_share, "unshare: Operation not permitted"),
        ("PrivateUsers=yes", Installed.run, "ns/user cannot be read"),
        ("SystemCallFilter=~@mount", Installed.run, "Operation not permitted"),
        ("SystemCallFilter=~@resources", Installed.pull, "the storekeeper cannot start"),
        ("SystemCallFilter=~@setuid", Installed.pull, "the storekeeper cannot start"),
        ("RestrictAddressFamilies=~AF_INET", Installed.pull, "Address family not supported"),
        ("DeviceAllow=", Installed.run, "error[image-mount]"),
    ],
)
def test_with_this_option_something_fails(
    unit: Installed, option: str, use: Callable[[Installed], None], consequence: str
) -> None:
    unit.cleanup()  # an image that is mounted already needs no device
    unit.set(option)
    with pytest.raises(CommandFailed, match=re.escape(consequence)):
        use(unit)


def test_the_document_explains_every_option(unit: Installed) -> None:
    document = DOCUMENT.read_text()
    text = (UNITS / SERVICE).read_text().partition("[Service]")[2].partition("[Install]")[0]
    used = {line.partition("=")[0] for line in text.splitlines() if line and not line.startswith("#")}
    used -= {"ExecStart"}
    for name in used | {option.partition("=")[0] for option in OWN_MOUNTS} | set(NEEDED):
        assert f"`{name}" in document, name


def test_a_restart_and_a_reload_lose_no_launch(unit: Installed) -> None:
    """systemd keeps the socket: who comes meanwhile waits in it."""
    unit.run()
    is_over = threading.Event()

    def launches(number: int) -> int:
        count = 0
        while not is_over.is_set():
            word = f"{number}.{count}"
            done = unit.node.run(images.busybox(), "echo", word, user=unit.alice)
            assert (done.stdout.decode(), done.stderr) == (f"{word}\n", b"")
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(launches, number) for number in range(4)]
        try:
            for verb in ("restart", "reload", "restart", "reload", "restart"):
                before = unit.systemd.main_pid(SERVICE)
                unit.log_file.write_text("")
                unit.systemd.ctl(verb, SERVICE)
                said = "site file read again" if verb == "reload" else "listening on"
                _wait_for(unit.log_file, said)
                assert (unit.systemd.main_pid(SERVICE) == before) == (verb == "reload")
        finally:
            is_over.set()
        assert all(one.result(60) for one in running)


def _wait_for(log: Path, words: str) -> None:
    wait_until(lambda: words in log.read_text(), what=lambda: f"{words!r} in\n{log.read_text()}")


def test_programs_outlive_a_stop_and_the_next_caller_starts_the_engine(unit: Installed) -> None:
    words = ["run", images.busybox(), "--", "sh", "-c", "echo; exec cat"]
    process = unit.node.popen(*words, user=unit.alice, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    before = unit.node.containerd.containers()
    unit.systemd.ctl("stop", SERVICE)
    assert unit.systemd.main_pid(SERVICE) == 0
    assert process.poll() is None
    # The same container, found again by an engine that this caller starts.
    unit.node.run(images.busybox(), "true", user=unit.alice)
    assert unit.systemd.main_pid(SERVICE) != 0
    assert set(before) <= set(unit.node.containerd.containers())
    process.communicate(timeout=20)
