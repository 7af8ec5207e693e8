"""The engine reads its site file again, stops, and starts again; who runs or is about to launch loses nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import Profile
from tests.support.polling import wait_until

pytestmark = [pytest.mark.root, pytest.mark.containerd]


def _reload(profile: Profile, *, says: str) -> None:
    """SIGHUP, and what the engine's log says after it."""
    engine = profile.node.engine
    before = len(engine.log())
    engine.process.send_signal(signal.SIGHUP)
    wait_until(lambda: says in engine.log()[before:], what=lambda: f"{says!r} in {engine.log()[before:]!r}")


def test_what_the_site_file_says_now_is_in_force_after_sighup(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    running = profile.start()[0]
    site = profile.node.site.file
    place = profile.node.host.root / "shown"
    place.mkdir()
    (place / "thing").touch()
    text = site.read_text()
    assert profile.run("ls", str(place), check=False).returncode != 0
    site.write_text(text.replace("carry = []", f"carry = [{str(place)!r}]"))
    _reload(profile, says="site file read again")
    assert profile.output("ls", str(place)) == "thing\n"
    assert running.poll() is None
    running.communicate()
    assert running.returncode == 0


@pytest.mark.parametrize("spoilt", ["no = 'such key'", "carry = 3", "["])
def test_a_wrong_site_file_is_named_and_changes_nothing(own_node_with_busybox: Profile, spoilt: str) -> None:
    profile = own_node_with_busybox
    site = profile.node.site.file
    site.write_text(f"{site.read_text()}\n{spoilt}\n")
    _reload(profile, says=f"the site file is not taken, all stays as it was: {site}")
    assert profile.output("echo", "goes on") == "goes on\n"


def test_a_site_file_that_somebody_else_could_have_written_is_not_taken(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    assert profile.user is not None
    site = profile.node.site.file
    for owner, mode in ((profile.uid, 0o644), (0, 0o664)):
        os.chown(site, owner, 0)
        os.chmod(site, mode)
        _reload(profile, says="not a file that only root can write")
    assert profile.output("echo", "goes on") == "goes on\n"


def test_what_needs_a_restart_is_said_and_stays_as_it_was_until_then(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    site = profile.node.site.file
    site.write_text(f"verify-at-mount = true\n{site.read_text()}".replace(str(profile.node.site.store), "/nowhere"))
    _reload(profile, says="site file read again; store, verify-at-mount after a restart, which ends no program")
    assert profile.output("echo", "goes on") == "goes on\n"


def test_launches_go_on_through_reloads_and_restarts_of_a_socket_that_stays_bound(
    own_node_with_busybox: Profile,
) -> None:
    """The engine makes its socket itself here, so nobody listens for a moment at each restart: a launch waits then."""
    profile = own_node_with_busybox
    is_over = threading.Event()
    failures: list[str] = []

    def launch(number: int) -> int:
        launches = 0
        while not is_over.is_set():
            done = profile.run("echo", str(number), check=False)
            if (done.returncode, done.stdout) != (0, f"{number}\n".encode()):
                failures.append(f"{done.returncode} {done.stderr!r}")
            launches += 1
        return launches

    with ThreadPoolExecutor(4) as pool:
        working = [pool.submit(launch, number) for number in range(4)]
        longest = 0.0
        for _ in range(3):
            profile.node.engine.process.send_signal(signal.SIGHUP)
            began = time.monotonic()
            profile.node.engine.restart()
            longest = max(longest, time.monotonic() - began)
            time.sleep(0.3)  # some launches in between; not a synchronisation
        is_over.set()
        launches = sum(one.result() for one in working)
    assert launches > 4
    # A launch asks for a little less than five seconds; a machine that needs longer for a start is another matter.
    assert not failures or (longest > 4 and all("error[no-engine]" in failure for failure in failures))


def test_an_engine_that_is_told_to_stop_serves_those_who_are_on_their_way_in(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    engine = profile.node.engine
    with ThreadPoolExecutor(24) as pool:
        done = [pool.submit(profile.run, "echo", "in", check=False) for _ in range(24)]
        wait_until(lambda: any(one.done() for one in done))
        engine.stop()
        results = [one.result() for one in done]
    served = [result for result in results if result.returncode == 0]
    # Whoever had connected is served; who comes later learns that there is no engine, in time.
    assert all(result.stdout == b"in\n" for result in served)
    assert all(b"error[no-engine]" in result.stderr for result in results if result.returncode != 0)
    assert "ending with" not in engine.log()
