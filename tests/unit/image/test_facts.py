"""Facts of a stored image: beside its record, carried along with it, and read by those who ask."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from hpcctr.errors import StoreUnusable
from hpcctr.image.facts import facts_of
from hpcctr.image.platform import of_this_node
from hpcctr.image.promotion import promote
from hpcctr.image.publish import publish, set_name, workspace
from hpcctr.image.record import FactsSummary, ImageConfig, ImageFacts, ImageRecord, Library, MpiLibrary, StoredImage
from hpcctr.image.reference import ImageRef
from hpcctr.image.store import Store, _recall
from tests.support.oci import digest_of

MPI = MpiLibrary(
    soname="libmpich.so.12", path="/usr/lib/libmpich.so.12.2.2", family="mpich", version="4.0.2", pmi=("pmi1",)
)
FACTS = ImageFacts(
    libc="glibc",
    libc_version="2.36",
    loader="/lib64/ld-linux-x86-64.so.2",
    libraries=(Library(soname="libc.so.6", path="/lib/libc.so.6", defines=("GLIBC_2.2.5", "GLIBC_2.36")),),
    mpi=(MPI,),
    pmix="5.0.7a1",
)
NAME = "local/solver:1"


def put(store: Store, facts: ImageFacts | None, content: bytes = b"hsqs") -> StoredImage:
    with workspace(store) as directory:
        file = Path(directory) / "made"
        file.write_bytes(content)
        record = ImageRecord(
            schema=1,
            digest=digest_of(content),
            platform=of_this_node(),
            config=ImageConfig(),
            file="root.squashfs",
            file_size=len(content),
            file_digest=digest_of(content),
            content_size=0,
            entries=1,
            created="2026-01-01T00:00:00Z",
            source=NAME,
        )
        image = publish(store, record, str(file), facts)
    set_name(store, ImageRef.parse(NAME).name_in_store(), of_this_node(), image.record.digest)
    return image


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"), writable=True)


def test_what_was_noted_comes_back(store: Store) -> None:
    put(store, FACTS)
    assert facts_of(store.find(NAME)) == FACTS


def test_every_launch_has_the_summary(store: Store) -> None:
    summary = put(store, FACTS).record.facts
    assert summary == FactsSummary.of(FACTS)
    assert summary is not None and (summary.mpi, summary.pmix, summary.library_count) == ((MPI,), "5.0.7a1", 1)
    assert b"GLIBC_2.2.5" not in Path(store.find(NAME).path).with_name("image.json").read_bytes()


def test_an_image_that_was_stored_before_has_none(store: Store) -> None:
    image = put(store, None)
    assert image.record.facts is None and facts_of(image) is None
    assert not Path(image.path).with_name("facts.json").exists()
    assert store.is_whole(image.record.digest)


def test_nothing_known_is_something_else_than_never_noted(store: Store) -> None:
    image = put(store, ImageFacts())
    assert image.record.facts == FactsSummary() and facts_of(image) == ImageFacts()


@pytest.mark.parametrize("damage", ["missing", "broken", "of another image", "of a user"])
def test_damaged_facts_are_an_error_and_the_image_is_brought_anew(store: Store, damage: str) -> None:
    image = put(store, FACTS)
    path = Path(image.path).with_name("facts.json")
    content = path.read_bytes()
    path.unlink()
    if damage == "broken":
        path.write_bytes(content[:-9])
    elif damage == "of another image":
        path.write_bytes(content.replace(image.record.digest[7:20].encode(), b"0" * 13))
    elif damage == "of a user":
        path.write_bytes(content)
        path.chmod(0o666)
    with pytest.raises(StoreUnusable):
        facts_of(image)
    assert not store.is_whole(image.record.digest)
    assert facts_of(put(store, FACTS)) == FACTS


def test_facts_of_a_shared_part_are_read_as_its_owners(store: Store) -> None:
    part = Store.open(f"{store.path}/users/61300", writable=True)
    assert facts_of(put(part, FACTS)) == FACTS


def test_a_promoted_image_keeps_its_facts(store: Store) -> None:
    part = Store.open(f"{store.path}/users/61300", writable=True)
    put(part, FACTS)
    promoted = promote(store.path, part, NAME, owner=61300, as_name="site/solver:1")
    assert promoted.path.startswith(f"{store.path}/images/")
    assert facts_of(promoted) == FACTS and promoted.record.facts == FactsSummary.of(FACTS)


def test_the_file_is_read_once_for_all_ranks(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    image = put(store, FACTS)
    facts_of(image)

    def never(*_: object) -> bytes:
        raise AssertionError("read again")

    monkeypatch.setattr(_recall, "_read", never)
    assert facts_of(image) == FACTS


def test_a_record_says_what_is_new_to_older_readers_beside_what_they_know(store: Store) -> None:
    """A reader that knows no facts leaves them out: nodes of a cluster are updated one by one."""
    raw = Path(put(store, FACTS).path).with_name("image.json").read_bytes()

    class Older(msgspec.Struct):
        digest: str

    assert msgspec.json.decode(raw, type=Older).digest == digest_of(b"hsqs")
