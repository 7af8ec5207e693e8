"""The generated files of /etc."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcctr.engine import accounts
from tests.support.values import a_caller, a_stored_image

ALICE = pwd.struct_passwd(("alice", "x", 1000, 100, "Alice A.", "/home/alice", "/bin/zsh"))
IMAGE = (
    b"root:x:0:0:root:/root:/bin/bash\n"
    b"node:x:1000:1000::/home/node:/bin/sh\n"
    b"alice:x:7:7::/:/bin/false\n"
    b"nobody:x:65534:65534::/:/bin/false"
)


def test_the_caller_comes_first_with_home_and_shell_of_the_host() -> None:
    lines = accounts.passwd(IMAGE, account=ALICE).split(b"\n")
    assert lines[0] == b"alice:x:1000:100:Alice A.:/home/alice:/bin/zsh"
    assert lines[-1] == b""


def test_the_image_says_nothing_of_the_callers_name_or_number() -> None:
    lines = accounts.passwd(IMAGE + b"\n\x31000:x:01000:0::/:/x\nu:x:0000001000:0::/:/x\n", account=ALICE)
    assert [line.split(b":")[0] for line in lines.splitlines()] == [b"alice", b"root", b"nobody"]


def test_a_caller_the_host_does_not_know_leaves_the_image_as_it_is() -> None:
    assert accounts.passwd(IMAGE, account=None) == IMAGE + b"\n"


@pytest.mark.parametrize(
    "line",
    [
        b"+::::::",
        b"+@netgroup:x:1:1:::",
        b"# comment",
        b"short:x:1",
        b"long:x:1:1:::/bin/sh:more",
        b":x:1:1:::",
        b"a b:x:1:1:::",
        b"n:x:-1:1:::",
        b"n:x:4294968296:1:::",
        b"n:x:99999999999:1:::",
        b"n:x:1:1:\0::",
        b"n:x:1:1:" + b"g" * 5000 + b"::",
        b"../x:x:1:1:::",
    ],
)
def test_lines_that_are_not_plain_accounts_are_dropped(line: bytes) -> None:
    assert accounts.passwd(line + b"\nok:x:1:1:::\n", account=None) == b"ok:x:1:1:::\n"


@given(st.binary(max_size=300))
def test_whatever_the_image_says_passwd_stays_well_formed_and_the_callers(untrusted: bytes) -> None:
    lines = accounts.passwd(untrusted, account=ALICE).split(b"\n")[:-1]
    assert all(line.count(b":") == 6 and b"\0" not in line for line in lines)
    assert [line for line in lines if line.startswith(b"alice:")] == [lines[0]]
    assert sum(int(line.split(b":")[2]) == 1000 for line in lines) == 1


def test_a_huge_file_of_the_image_is_cut() -> None:
    flood = b"".join(b"u%d:x:%d:1:::\n" % (number, number) for number in range(2000, 60_000))
    kept = accounts.passwd(flood, account=None)
    assert kept.count(b"\n") == 10_000
    assert len(accounts.passwd(b"u:x:5:5:" + b"g" * (2 << 20), account=None)) == 0


def test_a_directory_entry_cannot_add_lines_or_fields() -> None:
    evil = pwd.struct_passwd(("eve", "x", 9, 9, "E\nroot2:x:0:0", "/h:0", "/bin/sh\r"))
    assert accounts.passwd(b"", account=evil) == b"eve:x:9:9:Eroot2x00:/h0:/bin/sh\n"


def test_a_login_name_that_is_no_text_is_the_callers_all_the_same() -> None:
    """What the name service sends is bytes, and Python makes surrogates of those that are no UTF-8."""
    odd = pwd.struct_passwd(("m\udcfcller", "x", 1000, 100, "M\udcfcller", "/home/m", "/bin/sh"))
    image = b"m\xfcller:x:7:7:::\nroot:x:0:0:::\n"
    assert accounts.passwd(image, account=odd) == b"m\xfcller:x:1000:100:M\xfcller:/home/m:/bin/sh\nroot:x:0:0:::\n"


def test_the_callers_groups_have_the_hosts_names_and_the_caller_as_member() -> None:
    image = b"root:x:0:\nusers:x:100:bob\nstaff:x:50:\nvideo:x:27:root\n"
    made = accounts.group(image, groups={100: "lab", 44: "video"}, member="alice")
    assert made == b"video:x:44:alice\nlab:x:100:alice\nroot:x:0:\nstaff:x:50:\n"


def test_root_of_the_host_is_found_in_the_name_service(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    files = accounts.generated_etc(a_caller(uid=0, gid=0), a_stored_image().record, host_etc=str(tmp_path))
    assert files.keys() == {"passwd", "group", "hosts"}
    assert files["passwd"].startswith(b"root:x:0:0:")
    assert files["group"] == b"root:x:0:root\n"
    assert files["hosts"] == b"127.0.0.1 localhost\n"


def test_host_files_that_are_missing_huge_or_no_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"x" * ((1 << 20) + 1))
    (tmp_path / "resolv.conf").mkdir()
    files = accounts.generated_etc(a_caller(uid=0, gid=0), a_stored_image().record, host_etc=str(tmp_path))
    assert files.keys() == {"passwd", "group"}


def test_what_not_everybody_may_read_on_the_host_nobody_reads_inside(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("10.0.0.1 secret\n")
    (tmp_path / "hosts").chmod(0o640)
    files = accounts.generated_etc(a_caller(uid=0, gid=0), a_stored_image().record, host_etc=str(tmp_path))
    assert files.keys() == {"passwd", "group"}


def test_a_link_of_the_hosts_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("nameserver 127.0.0.53\n")
    (tmp_path / "resolv.conf").symlink_to("real")
    files = accounts.generated_etc(a_caller(uid=0, gid=0), a_stored_image().record, host_etc=str(tmp_path))
    assert files["resolv.conf"] == b"nameserver 127.0.0.53\n"
