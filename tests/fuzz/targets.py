"""What scripts/fuzz runs and tests/fuzz/test_corpus.py replays: every parser of outside data, each with an oracle.

A target takes bytes and returns. It raises for a finding: an exception that is no documented one, a value outside its
documented bounds, a round trip that does not come back, an answer that differs from a plain reading of the same words.
"""

from __future__ import annotations

import contextlib
import io
import os
import pwd
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from types import ModuleType

import msgspec

from hpcctr import context, lockfile, mounttable, proc
from hpcctr.client import connect
from hpcctr.engine import accounts, job, members
from hpcctr.errand import Errand, Failed, Said
from hpcctr.errors import (
    CallerRefused,
    FeatureUnusable,
    HpcctrError,
    LockFileWrong,
    PolicyUnusable,
    ProtocolBroken,
    ReferenceWrong,
    SiteFileWrong,
    StoreUnusable,
    of_slug,
)
from hpcctr.host import cdi_written, elf, ldcache, profile_written
from hpcctr.host.cdi_inject import CdiFile, Described, Injection
from hpcctr.host.cdi_text import Wrong
from hpcctr.host.edits import CacheEntry
from hpcctr.host.elf import NotElf
from hpcctr.image import exchange
from hpcctr.image import store as image_store
from hpcctr.image.layers import LayerMerge
from hpcctr.image.record import ImageRecord, NameRecord
from hpcctr.image.reference import ImageRef
from hpcctr.image.shelves import SharedName
from hpcctr.image.treestream import write_tree
from hpcctr.policy import written
from hpcctr.policy.decide import verdict
from hpcctr.policy.rules import Asked, Rule
from hpcctr.policy.shadow import shadowed
from hpcctr.request import TARGETS_MAX, ExecRequest, LaunchRequest, target_problem
from hpcctr.site import Site
from hpcctr.storekeeper import job as storekeeper_job
from hpcctr.wire import FRAME_MAX, Frame

_ACCOUNT = pwd.struct_passwd(("alice", "x", 4711, 4712, "Alice", "/home/alice", "/bin/sh"))
_GROUPS = {4712: "alice", 100: "users"}


def frame(data: bytes) -> None:
    """Frames: what is unpacked packs to the same bytes."""
    try:
        unpacked = Frame.unpack(data)
    except ProtocolBroken:
        return
    assert unpacked.pack() == data
    assert len(data) <= FRAME_MAX
    assert all(b"\0" not in value and re.fullmatch(r"[a-z-]+", name) for name, value in unpacked.fields)


_PARSERS: dict[str, Callable[[Frame], LaunchRequest | ExecRequest | Errand]] = {
    LaunchRequest.VERB: LaunchRequest.of_frame,
    ExecRequest.VERB: ExecRequest.of_frame,
    Errand.VERB: Errand.of_frame,
}


def request(data: bytes) -> None:
    """The engine's requests, by verb as a session reads them: within their bounds, and the same again."""
    try:
        unpacked = Frame.unpack(data)
        parse = _PARSERS.get(unpacked.verb)
        if parse is None:
            return
        parsed = parse(unpacked)
    except ProtocolBroken:
        return
    again = parse(Frame.unpack(parsed.frame().pack()))
    assert _values(again) == _values(parsed)
    if isinstance(parsed, LaunchRequest):
        assert len(parsed.targets) <= TARGETS_MAX
        for target in parsed.targets:
            assert target.kind in ("d", "f") and not target_problem(target.path) and b"\0" not in target.path
            assert os.path.normpath(target.path) == target.path != b"/"
        assert parsed.as_of is None or 0 <= parsed.as_of < 10**11
        merged = parsed.targets_with(["/scratch"])
        assert not any(one.path.startswith(other.path + b"/") for one in merged for other in merged)
    elif isinstance(parsed, ExecRequest):
        assert 0 < parsed.pid <= 4194304
    else:
        assert all(word.isprintable() and len(word) <= 8192 for word in _values(parsed))


def _values(parsed: LaunchRequest | ExecRequest | Errand) -> list[str]:
    names = (
        parsed.__slots__ if not isinstance(parsed, Errand) else [field.name for field in msgspec.structs.fields(Errand)]
    )
    return [str(getattr(parsed, name)) for name in names]


def answer(data: bytes) -> None:
    """The client's side: an answer of the engine's, or its error."""
    try:
        granted = connect._granted(data)
        assert granted.verb == "granted" and granted.pack() == data
        granted.text("name", "")
    except ProtocolBroken:
        return
    except HpcctrError as error:
        told = Frame.unpack(data)
        assert told.verb == "error" and error.message == told.text("message") and error.exit_status in (125, 126, 127)
        os.fsencode(error.for_stderr())


def said(data: bytes) -> None:
    """Lines of a storekeeper: what is decoded encodes to the same value."""
    try:
        line: Said = msgspec.json.decode(data, type=Said)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    assert msgspec.json.decode(msgspec.json.encode(line), type=Said) == line
    if isinstance(line, Failed):
        assert isinstance(line.error(), of_slug(line.slug))


_ASKED = tuple(
    Asked(
        user_names=frozenset({"alice", "4711", "@users", "@100"}),
        image_name=image,
        other_names=others,
        targets=targets,
        features=features,
        devices=devices,
    )
    for image, others in (
        ("docker.io/library/debian:12", ()),
        ("private/localhost/app:latest", ()),
        ("sha256:" + "a" * 64, ("quay.io/org/app:nightly",)),
    )
    for targets in ((), (b"/tmp", b"/scratch2/a"), (b"/scratch/\xff",))
    for features, devices in (((), ()), (("mpi",), ("vendor.com/gpu=0",)))
)


def policy(data: bytes) -> None:
    """Policy files: rules within their bounds, decided as a plain reading of them decides; none shadowed decides."""
    try:
        rules = written.parse(data, "/etc/hpcctr/policy.d/10-fuzz.toml")
    except PolicyUnusable as error:
        assert "10-fuzz.toml" in error.message and error.hint and len(error.message) < 4000
        return
    assert len(rules) <= written.RULES_MAX and len({rule.name for rule in rules}) == len(rules)
    never = {id(rule) for rule, _ in shadowed(rules[:20])}
    for rule in rules:
        assert rule.name and rule.label.isprintable() and rule.users and rule.images and rule.registries != ()
        for target in rule.targets or ():
            assert target == "/" or (os.path.normpath(target) == target and target.startswith("/"))
    for asked in _ASKED:
        plainly = next((rule for rule in rules if _plainly_matches(rule, asked)), None)
        result = verdict(rules, asked)
        assert result.rule is plainly and result.is_allowed == (plainly is not None and plainly.action == "allow")
        assert result.text.startswith(asked.image_name) and id(result.rule) not in never


def _plainly_matches(rule: Rule, asked: Asked) -> bool:
    """The rule's words, read one by one."""
    if "*" not in rule.users and not set(rule.users) & asked.user_names:
        return False
    names = [asked.image_name, *(asked.other_names if rule.action == "deny" else ())]
    if not any(
        any(fnmatchcase(name, glob) for glob in rule.images)
        and (
            rule.registries is None
            or (name.split("/")[0] in rule.registries and not name.startswith(("private/", "sha256:")))
        )
        for name in names
    ):
        return False
    fits_all: list[bool] = []
    of_all = all if rule.action == "allow" else any
    if rule.targets is not None:
        tops = [[part for part in top.encode().split(b"/") if part] for top in rule.targets]
        fits_all.append(of_all(any(path.split(b"/")[1:][: len(top)] == top for top in tops) for path in asked.targets))
    for globs, asked_names in ((rule.features, asked.features), (rule.devices, asked.devices)):
        if globs is not None:
            fits_all.append(of_all(any(fnmatchcase(name, glob) for glob in globs) for name in asked_names))
    return all(fits_all)


def site(data: bytes) -> None:
    """Site files: the same site from the same words, with plain paths."""
    descriptor = os.memfd_create("site.toml")
    try:
        os.write(descriptor, data)
        loaded = Site.load(f"/proc/self/fd/{descriptor}")
    except (SiteFileWrong, PolicyUnusable) as error:
        assert error.hint and "/proc/self/fd/" in error.message
        return
    finally:
        os.close(descriptor)
    for path in (loaded.store, loaded.enter, *loaded.carry):
        assert path.startswith("/") and os.path.normpath(path) == path != "/"
    assert loaded.runtime in ("runc", "crun") and 1 <= loaded.mark_days <= 3650
    assert msgspec.convert(msgspec.to_builtins(loaded), Site) == loaded


def cdi(data: bytes) -> None:
    """CDI files: documents within their bounds, that come to edits of what they name, or to an error of ours."""
    try:
        document = cdi_written.parse(data)
    except Wrong as error:
        assert str(error) and len(str(error)) < 1000
        return
    assert document.devices and document.version <= "1.1.0" and not cdi_written.kind_problem(document.kind)
    assert len({device.name for device in document.devices}) == len(document.devices)
    file = CdiFile(path="/etc/cdi/fuzz.yaml", priority=0, document=document)
    for device in document.devices[:4]:
        named = Described(file=file, device=device)
        assert cdi_written.split_name(named.name) == (document.kind, device.name)
        injection = Injection(allowed_hooks=("/bin/true",), caller_gids=(), root_owned=True)
        try:
            injection.add([named])
            edits = injection.edits()
        except FeatureUnusable as error:
            assert error.hint and "/etc/cdi/fuzz.yaml" in error.message and len(error.message) < 20 * len(data) + 500
            continue
        assert all(hook.path == "/bin/true" and hook.env for hook in edits.hooks)
        assert all(edit.path.startswith("/dev/") for edit in edits.devices)
        for target in [*(mount.target for mount in edits.mounts), *(link.path for link in edits.links)]:
            assert not target_problem(os.fsencode(target)) and "\0" not in target
        depths = [mount.target.count("/") for mount in edits.mounts]
        assert depths == sorted(depths) and len({mount.target for mount in edits.mounts}) == len(depths)
        assert len({edit.name for edit in edits.env}) == len(edits.env)


def reference(data: bytes) -> None:
    """Image names: what is printed parses to the same, and lock files and shares have the same idea of a name."""
    text = data.decode("utf-8", "surrogateescape")
    with contextlib.suppress(ReferenceWrong):
        shared = SharedName.parse(text)
        assert SharedName.parse(str(shared)) == shared and "\n" not in text and "\0" not in text
    try:
        ref = ImageRef.parse(text)
    except ReferenceWrong as error:
        assert len(error.message) < 20 * len(text) + 500 and error.hint
        return
    assert ImageRef.parse(str(ref)) == ref and ImageRef.parse(ref.familiar) == ref
    named = ref.name_in_store()
    assert named.name_in_store() == named and not named.is_file
    for part in (named.registry, *named.repository.split("/"), named.tag or "x"):
        assert part not in ("", ".", "..") and "/" not in part and "@" not in part and part.isascii()
    assert str(named).isprintable() and len(str(named)) < 500
    if not ref.is_file:
        assert named.registry == named.registry.lower()
        assert lockfile.full_name(text) == str(named)


def passwd_of_image(data: bytes) -> None:
    """passwd(5) and group(5) of an image: well-formed lines, and of the caller's name and number only the caller's."""
    lines = accounts.passwd(data, account=_ACCOUNT).split(b"\n")
    assert lines.pop() == b"" and lines[0] == b"alice:x:4711:4712:Alice:/home/alice:/bin/sh"
    for line in lines[1:]:
        name, _, uid, gid, *rest = line.split(b":")
        assert len(rest) == 3 and name != b"alice" and int(uid) != 4711 and int(gid) < 2**32 and len(line) <= 4096
        assert re.fullmatch(rb"[A-Za-z0-9_.@$-]+", name) and b"\0" not in line
    lines = accounts.group(data, groups=_GROUPS, member="alice").split(b"\n")
    assert lines.pop() == b"" and lines[:2] == [b"users:x:100:alice", b"alice:x:4712:alice"]
    for line in lines[2:]:
        name, _, gid, _ = line.split(b":")
        assert name not in (b"alice", b"users") and int(gid) not in _GROUPS and len(line) <= 4096
    assert len(lines) <= 10_002


def record(data: bytes) -> None:
    """Records of the store: the same again, or damaged."""
    for kind in (ImageRecord, NameRecord):
        with contextlib.suppress(StoreUnusable):
            decoded = image_store._decode(data, kind, "/store/image.json")
            assert image_store._decode(msgspec.json.encode(decoded), kind, "/store/image.json") == decoded


_LIB = "usr/lib/x86_64-linux-gnu"
_LIBRARY_NAMES = (
    *("etc/ld.so.conf", f"{_LIB}/libc.so.6", f"{_LIB}/liba.so.1", "lib/ld-musl-x86_64.so.1", "opt/lib/libmpi.so.12"),
    *("opt/lib/libmpi.so.40", "opt/lib/openmpi/mca_pmix_a.so", "opt/lib/libpmix.so.2"),
)


def image_facts(data: bytes) -> None:
    """Libraries of an image, whatever is in them: facts a puller takes, and the stream is what it is without them.

    Between separators lie the contents of the files in their order; the last one is that of all further files."""
    contents = data.split(b"\0====\0")
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        for number, name in enumerate(_LIBRARY_NAMES):
            content = contents[min(number, len(contents) - 1)]
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    merge = LayerMerge()
    merge.apply(iter([layer.getvalue()]), "layer 1")
    merged = io.BytesIO()
    noted = write_tree(merge.tree, 1, lambda _: iter([layer.getvalue()]), merged.write, lambda done, total: None)
    assert noted.facts is not None
    assert exchange.parse_facts(msgspec.json.encode(noted)) == noted
    merged.seek(0)
    with tarfile.open(fileobj=merged, mode="r:") as archive:
        for number, name in enumerate(_LIBRARY_NAMES):
            member = archive.extractfile(name)
            assert member is not None and member.read() == contents[min(number, len(contents) - 1)]


def lock(data: bytes) -> None:
    """Lock files: what is written is read, and comments and other lines stay."""
    text = data.decode("utf-8", "replace")
    try:
        images = lockfile.parse(text, "images.lock")
    except LockFileWrong as error:
        assert "images.lock, line " in error.message
        return
    assert len({(one.name, one.platform) for one in images}) == len(images)
    written_again = lockfile.updated(text, images, "images.lock")
    assert set(lockfile.parse(written_again, "images.lock")) == set(images)
    assert lockfile.updated(written_again, images, "images.lock") == written_again
    for one in images:
        assert one.launched_as.endswith(one.digest) and " " not in one.line().replace(" ", "", 2)


def mount_table(data: bytes) -> None:
    """Mount tables with users' words in them: every field is what the user said, and the root's upper layer the root's.

    The kernel's escapes: seq_path() and mangle() of fs/proc_namespace.c write blank, tab, line feed and backslash in
    octal digits.
    """
    words = (*data.replace(b"\0", b"").split(b"\n", 4), *([b""] * 5))[:5]
    target, source, option, kind, rest = words
    kind = re.sub(rb"[^a-z0-9_.]", b"", kind) or b"fuse"
    theirs = b"45 30 0:44 / /" + _escaped(target) + b" rw,nosuid - " + kind + b" " + _escaped(source)
    theirs += b" rw," + _escaped(option + rest)
    root = b"30 1 0:30 / / ro,relatime - overlay hpcctr ro,lowerdir=/l,upperdir=/run/hpcctr/upper/1,workdir=/w"
    table = root + b"\n" + theirs + b"\n"
    with _fed(proc, table):
        entries = mounttable.read_mounts()
    assert [os.fsencode(entry.target) for entry in entries] == [b"/", b"/" + target]
    assert os.fsencode(entries[1].source) == source and os.fsencode(entries[1].kind) == kind
    assert members.upper_in(entries) == "/run/hpcctr/upper/1"
    for order in (table, theirs + b"\n" + root + b"\n"):
        with _fed(members, order):
            found = members.root_upper(1)
        # A mount of the user's own on "/" itself would be the root: no user makes one in a view.
        assert found == "/run/hpcctr/upper/1" or not target


def proc_of_process(data: bytes) -> None:
    """What /proc says of a process that named itself, and of a cgroup that was given to a user to name."""
    name = data.replace(b"\0", b"")[:15]
    shown = name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n")  # proc_task_name() of fs/proc/array.c
    status = (
        b"Name:\t" + shown + b"\nUmask:\t0022\nState:\tS (sleeping)\nUid:\t1\t1\t1\t1\nCapEff:\t0\nNoNewPrivs:\t1\n"
    )
    with _fed(proc, status):
        words = context.read_status(1)
    assert (words["State"], words["Uid"], words["NoNewPrivs"]) == ("S (sleeping)", "1\t1\t1\t1", "1")
    with _fed(job, b"7 (" + name + b") S 1 " + b" ".join(b"%d" % number for number in range(5, 60)) + b"\n"):
        assert job._start(7) == "22"
    part = data.replace(b"\0", b"").replace(b"\n", b"").replace(b"/", b"")[:255]
    cgroups = job.JobCgroups(directories=["/cg/slurm/uid_1/job_7"], places={"": "/cg"})
    for path, is_in in ((b"/slurm/uid_1/job_7/" + part, True), (b"/user/" + part, False)):
        with _fed(proc, b"0::" + path + b"\n"):
            assert cgroups.have(1) is is_in
        with _fed(members, b"0::" + path + b"\n"):
            assert members.is_anchor(1) is (re.fullmatch(rb"hpcctr-[0-9a-f]{32}-[0-9a-f]{8}", part) is not None)
    # Where the storekeeper of a process in that cgroup is put.
    with _fed(proc, b"0::/user/" + part + b"\n"), _mounted_at_cg(storekeeper_job):
        try:
            place = storekeeper_job.Place.of_process(os.getpid())
        except CallerRefused:
            assert part == b".."
        else:
            assert place.cgroups == (f"/cg/user/{os.fsdecode(part)}".rstrip("/") + "/cgroup.procs",)


def _escaped(word: bytes) -> bytes:
    return re.sub(rb"[ \t\n\\]", lambda found: b"\\%03o" % found[0][0], word)


@contextlib.contextmanager
def _mounted_at_cg(module: ModuleType) -> Iterator[None]:
    """A node whose cgroups (version 2) are at /cg."""
    real = module.cgroup_hierarchies, module.read_mounts
    module.cgroup_hierarchies, module.read_mounts = lambda _: {"": "/cg"}, list  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.cgroup_hierarchies, module.read_mounts = real  # type: ignore[attr-defined]


@contextlib.contextmanager
def _fed(module: ModuleType, content: bytes) -> Iterator[None]:
    """`open` of a module gives this content, in the way it asks for."""

    def opened(path: str, mode: str = "r", **options: str | None) -> io.BytesIO | io.TextIOWrapper:
        del path
        return io.BytesIO(content) if "b" in mode else io.TextIOWrapper(io.BytesIO(content), **options)  # type: ignore[arg-type]

    setattr(module, "open", opened)  # noqa: B010
    try:
        yield
    finally:
        delattr(module, "open")


def elf_file(data: bytes) -> None:
    """Programs and libraries, an image's among them: a file within its bounds, or none; the same at every reading."""
    try:
        file = elf.parse(io.BytesIO(data))
    except NotElf:
        return
    assert elf.parse(io.BytesIO(data)) == file and file.bits in (32, 64)
    for text in (file.soname, file.interpreter, *file.needed, *file.defines, *(name for name, _ in file.needs)):
        assert len(text) <= 1024 and "\0" not in text
    assert len(file.needed) <= 1024 and len(file.defines) <= 4096 and sum(map(len, file.runpath)) <= 65536
    assert sum(len(versions) for _, versions in file.needs) <= 4096
    assert all(os.fsdecode(os.fsencode(text)) == text for text in (file.soname, *file.runpath))


_HOST_LIBRARIES = tuple(
    CacheEntry(soname=name, path=f"/.hpcctr-host/lib/{name}", flags=0x303, origin="fuzz")
    for name in ("libcuda.so.1", "libibverbs.so.1", "libmpi.so.12", "libfabric.so.1")
)


def ld_cache(data: bytes) -> None:
    """An image's ld.so.cache: in what is made of it the loader finds every name, the node's libraries first."""
    theirs = ldcache.listed(data)
    found = ldcache.listed(ldcache.merged(data, _HOST_LIBRARIES))
    assert set(found) <= {*theirs, *(replace(one, origin="ld.so.cache") for one in _HOST_LIBRARIES)}
    names = [one.soname.encode() for one in found]
    for entry in _HOST_LIBRARIES:
        at = _searched(names, entry.soname.encode())
        assert at is not None and (found[at].path, found[at].flags) == (entry.path, entry.flags)
    for name in names[:500]:
        at = _searched(names, name)
        assert at is not None and _libcmp(names[at], name) == 0 and (at == 0 or _libcmp(names[at - 1], name) != 0)


def _searched(names: list[bytes], wanted: bytes) -> int | None:
    """The first entry of a name, by the search of search_cache() in glibc's elf/dl-cache.c."""
    left, right = 0, len(names) - 1
    while left <= right:
        middle = (left + right) // 2
        compared = _libcmp(wanted, names[middle])
        if compared == 0:
            while middle > 0 and _libcmp(wanted, names[middle - 1]) == 0:
                middle -= 1
            return middle
        left, right = (middle + 1, right) if compared < 0 else (left, middle - 1)
    return None


def _libcmp(one: bytes, other: bytes) -> int:
    """As _dl_cache_libcmp() compares, with the overflow of its numbers."""
    at = there = 0
    one, other = one + b"\0", other + b"\0"
    while one[at]:
        digits = one[at : at + 1].isdigit(), other[there : there + 1].isdigit()
        if all(digits):
            numbers = []
            for text, begin in ((one, at), (other, there)):
                end = begin
                while text[end : end + 1].isdigit():
                    end += 1
                numbers.append((end, _int32(int(text[begin:end]))))
            (at, first), (there, second) = numbers
            if first != second:
                return _int32(first - second)
        elif any(digits):
            return 1 if digits[0] else -1
        elif one[at] != other[there]:
            return one[at] - other[there]
        else:
            at, there = at + 1, there + 1
    return one[at] - other[there]


def _int32(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31


def profile(data: bytes) -> None:
    """Profiles of host features: plain places, none the caller's or the engine's, or an error that names the file."""
    path = "/etc/hpcctr/profiles.d/ib.toml"
    try:
        parsed = profile_written.parse(data, path)
    except FeatureUnusable as error:
        assert path in error.message and path in error.hint and len(error.message) < 4000
        return
    places = [shown.path for shown in (*parsed.directories, *parsed.files)]
    for place in (*places, *parsed.devices, *(word for word in parsed.libraries if "/" in word)):
        assert place.startswith("/") and os.path.normpath(place) == place and place.isprintable()
    for place in places:
        assert place not in ("/", "/run")
        assert not f"{place}/".startswith(("/proc/", "/sys/", "/dev/", "/run/hpcctr/", "/.hpcctr-host/"))
        parts = place.split("/")
        for never in (["", "proc"], ["", "run", "hpcctr"], ["", "dev", "shm"]):
            assert len(parts) != len(never) or not all(map(fnmatchcase, never, parts))
    assert all(word.startswith("/dev/") for word in parsed.devices)
    assert not any(name.startswith("LD_") or "\n" in value for name, value in parsed.env)
    assert parsed.optional <= {*parsed.libraries, *parsed.devices, *places}
    assert parsed.memlock is None or parsed.memlock == -1 or parsed.memlock > 0


TARGETS: dict[str, Callable[[bytes], None]] = {
    "frame": frame,
    "request": request,
    "answer": answer,
    "said": said,
    "policy": policy,
    "site": site,
    "cdi": cdi,
    "reference": reference,
    "accounts": passwd_of_image,
    "record": record,
    "image-facts": image_facts,
    "lockfile": lock,
    "mounts": mount_table,
    "proc": proc_of_process,
    "elf": elf_file,
    "ld-cache": ld_cache,
    "profile": profile,
}
