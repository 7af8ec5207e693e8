"""The gateway's socket, directories and limits."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hpcctr.engine import serve
from hpcctr.errors import EngineBusy, StoreUnusable

pytestmark = pytest.mark.root


def test_the_socket_is_everybodys_and_a_dead_one_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    serve.own_listener(path).close()
    with serve.own_listener(path):
        assert os.stat(path).st_mode & 0o777 == 0o666
        with pytest.raises(EngineBusy, match="already"):
            serve.own_listener(path)


def test_a_listening_socket_of_systemd_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid());"
        "from hpcctr.engine.serve import inherited_listener;"
        "s = inherited_listener(); print(s.getsockname(), s.family.name, s.type.name, s.get_inheritable())"
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        done = subprocess.run(
            [sys.executable, "-c", code, str(listener.fileno())],
            env={**os.environ, "LISTEN_FDS": "1"},
            pass_fds=[listener.fileno()],
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout == f"{tmp_path}/s AF_UNIX SOCK_SEQPACKET False\n"


def test_without_systemd_there_is_no_inherited_listener() -> None:
    assert serve.inherited_listener() is None


def test_directories_of_somebody_else_stop_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "RUN_DIRECTORY", str(tmp_path / "run"))
    monkeypatch.setattr(serve, "STATE_DIRECTORY", str(tmp_path / "run/state"))
    serve.make_run_directory()
    assert os.stat(tmp_path / "run/state").st_mode & 0o777 == 0o700
    serve.make_run_directory()
    os.chmod(tmp_path / "run/state", 0o755)
    with pytest.raises(StoreUnusable, match="state"):
        serve.make_run_directory()
    os.chmod(tmp_path / "run/state", 0o700)
    os.chown(tmp_path / "run", 1234, 0)
    with pytest.raises(StoreUnusable, match="run"):
        serve.make_run_directory()
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.setattr(serve, "RUN_DIRECTORY", str(tmp_path / "link"))
    with pytest.raises(StoreUnusable, match="link"):
        serve.make_run_directory()


#: A gateway whose signals never reach its main thread in a system call: another thread takes them all.
_DEAF = """
import signal, socket, sys, threading
from hpcctr.engine import serve
from hpcctr.engine.gateway import Gateway
from hpcctr.site import Site
bell = serve._bell_of_signals()
wanted = {signal.SIGTERM, signal.SIGINT}
is_over = threading.Event()
threading.Thread(target=is_over.wait).start()
signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
with socket.socket(fileno=int(sys.argv[1])) as listener:
    print("ready", flush=True)
    Gateway(Site(), nodes=None).accept(listener, bell)
    is_open = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    print("stopped", serve._rings_for_the_end(bell), is_open, flush=True)
is_over.set()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_heard_whichever_thread_takes_it_and_leaves_the_socket_open(
    tmp_path: Path, number: signal.Signals
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        argv = [sys.executable, "-c", _DEAF, str(listener.fileno())]
        with subprocess.Popen(argv, pass_fds=[listener.fileno()], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            process.send_signal(number)
            assert process.communicate(timeout=20)[0] == f"stopped {number != signal.SIGHUP} 1\n"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(tmp_path / "s"))


def test_it_goes_on_when_it_was_out_of_descriptors(tmp_path: Path) -> None:
    code = """
import os, resource, socket, sys, threading
from hpcctr.engine.gateway import Gateway
from hpcctr.site import Site
listener = socket.socket(fileno=int(sys.argv[1]))
bell, ringer = os.pipe()
highest = max(int(name) for name in os.listdir("/proc/self/fd"))
gateway = Gateway(Site(), nodes=None)
served = threading.Event()
gateway._serve = lambda user, connection: served.set()
resource.setrlimit(resource.RLIMIT_NOFILE, (highest, 4096))
filled = []
try:
    while True:
        filled.append(os.dup(0))
except OSError:
    pass
threading.Thread(target=gateway.accept, args=(listener, bell), daemon=True).start()
print("full", flush=True)
sys.stdin.readline()
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
print("served", served.wait(20), flush=True)
"""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with subprocess.Popen(
            [sys.executable, "-c", code, str(listener.fileno())],
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdin is not None and process.stdout is not None and process.stderr is not None
            assert process.stdout.readline() == "full\n"
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
                client.connect(str(tmp_path / "s"))
                assert "no session can begin: Too many open files" in process.stderr.readline()
                process.stdin.write("\n")
                process.stdin.flush()
                assert process.stdout.readline() == "served True\n"
