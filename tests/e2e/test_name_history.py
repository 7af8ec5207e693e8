"""A job's names mean what they meant when it started, whoever pulls them anew meanwhile."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.support.node import Node
from tests.support.oci import busybox, file, tar, write_oci_archive
from tests.support.polling import wait_until
from tests.support.registry import Registry
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

RANKS = 8


def _push(registry: Registry, edition: str) -> None:
    registry.push_image("app", "1", busybox(layers=[tar(file("etc/edition", edition.encode()))]))


def _next_second() -> int:
    """A second that has just begun: what happened before is older, by the clock of records."""
    now = int(time.time())
    wait_until(lambda: time.time() >= now + 1, what="the next second")
    return now + 1


@pytest.mark.parametrize("variable", ["SLURM_JOB_START_TIME", "HPCCTR_AS_OF"])
def test_ranks_that_start_while_the_name_is_pulled_anew_all_get_one_digest(
    shop: Node, alice: User, bob: User, registry: Registry, variable: str
) -> None:
    name = f"{registry.address}/app:1"
    _push(registry, "first")
    shop.hpcctr("pull", name, user=bob)
    start = _next_second()
    job = {variable: str(start)}
    _next_second()
    words = ["sh", "-c", 'cat /etc/edition; echo " $HPCCTR_IMAGE_DIGEST"']

    def ranks() -> list[tuple[bytes, bytes]]:
        launches = [
            shop.popen("run", name, "--", *words, user=alice, env=job, stdout=-1, stderr=-1) for _ in range(RANKS)
        ]
        return [launch.communicate(timeout=60) for launch in launches]

    printed = []
    for edition in ("second", "third"):
        _push(registry, edition)
        puller = shop.popen("pull", name, user=bob, stdout=-1, stderr=-1)
        printed += ranks()
        assert puller.wait(60) == 0, puller.communicate()
        printed += ranks()
    assert {output.split()[0] for output, _ in printed} == {b"first"}, printed
    assert len({output for output, _ in printed}) == 1
    # Outside of the job, and for who asks for the present, it is what was pulled last.
    for env, flags in (({}, []), (job, ["--pull", "always"]), ({**job, "HPCCTR_AS_OF": "now"}, [])):
        assert shop.run(name, "cat", "/etc/edition", user=alice, env=env, flags=flags).stdout == b"third"
    explained = shop.run(name, "true", user=alice, env=job, flags=["--explain"]).stdout.decode()
    assert "its meaning as of " in explained and "; now sha256:" in explained
    assert "because='its meaning as of " in shop.engine.log()
    # Root's own launches as well.
    assert shop.run(name, "cat", "/etc/edition", env=job).stdout == b"first"


def test_what_came_after_the_start_is_taken_as_it_first_was(
    shop: Node, alice: User, bob: User, registry: Registry
) -> None:
    """The first rank brings the image; whoever pulls the name anew, the others get the same."""
    name = f"{registry.address}/app:1"
    job = {"SLURM_JOB_START_TIME": str(_next_second())}
    _next_second()
    _push(registry, "first")
    assert shop.run(name, "cat", "/etc/edition", user=alice, env=job).stdout == b"first"
    _push(registry, "second")
    shop.hpcctr("pull", name, user=bob)
    assert shop.run(name, "cat", "/etc/edition", user=alice, env=job).stdout == b"first"
    assert b"first meaning" in shop.run(name, "true", user=alice, env=job, flags=["--explain"]).stdout


def test_what_the_name_meant_and_is_gone_is_refused_with_both_remedies(
    shop: Node, alice: User, bob: User, registry: Registry
) -> None:
    name = f"{registry.address}/app:1"
    _push(registry, "first")
    shop.hpcctr("pull", name, user=bob)
    job = {"HPCCTR_AS_OF": str(_next_second())}
    _next_second()
    _push(registry, "second")
    record = next(shop.site.store.glob("names/*/app/1.*.json"))
    digest = json.loads(record.read_text())["history"][0]["digest"]
    shop.hpcctr("pull", name, user=bob)
    shop.hpcctr("rm", digest)
    refused = shop.run(name, "true", user=alice, env=job, check=125).stderr.decode()
    assert "error[image-gone]" in refused and "HPCCTR_AS_OF=now" in refused
    remedy = f"{registry.address}/app@{digest}"
    assert f"hpcctr pull {remedy}" in refused
    shop.hpcctr("pull", remedy, user=alice)
    assert shop.run(name, "cat", "/etc/edition", user=alice, env=job).stdout == b"first"


def test_a_name_of_ones_own_that_is_younger_than_the_job_is_not_for_it(
    shop: Node, alice: User, registry: Registry, place: Path
) -> None:
    name = f"{registry.address}/app:1"
    _push(registry, "the site's")
    shop.hpcctr("pull", name)
    job = {"HPCCTR_AS_OF": str(_next_second())}
    _next_second()
    archive = write_oci_archive(place / "app.tar", busybox(layers=[tar(file("etc/edition", b"alice's"))]))
    shop.hpcctr("pull", "--name", name, f"oci-archive:{archive}", user=alice)
    assert shop.run(name, "cat", "/etc/edition", user=alice).stdout == b"alice's"
    assert shop.run(name, "cat", "/etc/edition", user=alice, env=job).stdout == b"the site's"


def test_a_moment_that_is_none_is_named(shop: Node, alice: User) -> None:
    refused = shop.run("app:1", "true", user=alice, env={"HPCCTR_AS_OF": "yesterday"}, check=125)
    assert b"error[usage]" in refused.stderr and b"HPCCTR_AS_OF='yesterday'" in refused.stderr
