"""Which road an image takes into the store, by who asks and where it comes from.

Who may write the store writes it (its owner; root, while it is root's). For everybody else a storekeeper does, as its
owner: from a registry into what the site offers to everyone; from a file, or with the user's own credentials, into the
user's own part. Files and credentials never leave the user's process: it reads, the storekeeper gets bytes.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable, Iterator

from hpcctr.cli import errands
from hpcctr.cli.progress import say, shown
from hpcctr.cli.table import printable, size
from hpcctr.errand import Errand, Progressed, Pulled
from hpcctr.errors import (
    ImageGone,
    ImageNotInStore,
    NotAnImage,
    PullRefused,
    RegistryFailed,
    RegistryWantsLogin,
    StoreUnusable,
    UsageWrong,
)
from hpcctr.image import ociarchive
from hpcctr.image import platform as platforms
from hpcctr.image.archive import DockerArchive, LayoutSource, find_image, open_files, open_regular
from hpcctr.image.compression import CHUNK, decompressed, is_compressed
from hpcctr.image.record import Platform
from hpcctr.image.reference import ImageRef
from hpcctr.image.shelves import is_shared_name, owner_of
from hpcctr.image.store import Store, source_text
from hpcctr.lockfile import Locked
from hpcctr.request import RunWords
from hpcctr.site import Site

Tell = Callable[[Progressed], None]


def pull_one(
    text: str, *, platform: str = "", name: str = "", is_private: bool = False, verify: bool = False
) -> Locked:
    """Bring one image, with progress on stderr; the name to run it by, and what that is."""
    if is_shared_name(text):
        raise UsageWrong(
            f"{text} is another user's image, in the store already", hint=f"hpcctr run {text}; hpcctr inspect {text}"
        )
    ref = ImageRef.parse(text)
    site = Site.of_this_process()
    with shown(printable(text)) as progress:
        pulled = bring(
            ref,
            site,
            platform=platform,
            name=name,
            is_private=is_private,
            verify=verify,
            tell=progress.update,
        )
    if pulled is None:  # another launch of this user's did it, and has said so
        image = Store.open(site.store).find(str(ref), platforms.parse(platform) if platform else None)
        return Locked(name=image.name, digest=image.record.digest, platform=str(image.record.platform))
    state = "up to date" if pulled.was_stored else f"pulled, {size(pulled.file_size)}"
    say(f"{ImageRef.parse(pulled.name).familiar}: {state}, {pulled.digest}")
    return Locked(name=pulled.name, digest=pulled.digest, platform=pulled.platform)


def bring_for(words: RunWords, missing: ImageNotInStore | None = None) -> None:
    """Bring the image of a launch, which then finds it by the same words; ``missing`` is why it has to.

    Where a site has its images brought by others, that it is missing is what went wrong; and so it is for what no
    registry has under that name: another user's, or what the name meant when the job started.
    """
    if missing is not None and (is_shared_name(words.image) or isinstance(missing, ImageGone)):
        raise missing
    if is_shared_name(words.image):
        return
    try:
        pull_one(words.image, platform=words.platform)
    except PullRefused as error:
        if missing is None:
            raise
        raise ImageNotInStore(missing.message, hint=f"{missing.hint}: not by you: {error.message}") from None


def bring(
    ref: ImageRef,
    site: Site,
    *,
    platform: str = "",
    name: str = "",
    is_private: bool = False,
    verify: bool = False,
    tell: Tell = lambda _: None,
) -> Pulled | None:
    """Bring an image; None when another launch of this user's on this node has just done so.

    With ``is_private`` into the user's own part whatever it is. Raises any :class:`HpcctrError`.
    """
    ref = ref.absolute()
    if is_writer(site.store):
        return _pull_here(ref, site, platform, name, verify, tell)
    if os.getuid() == 0:
        return _by_storekeeper(ref, site, platform, name, verify, tell)
    if ref.is_file or is_private or name:
        return _import(ref, site, platform, name, verify, tell)
    try:
        errand = Errand(task="pull", image=str(ref), platform=platform, verify=_word(verify))
        return _asked(errands.run(errand, site), tell)
    except RegistryWantsLogin as error:
        if not _has_login(ref):
            raise
        _note(tell, f"{error.message}: with your credentials, into your own images")
        return _import(ref, site, platform, name, verify, tell)


def _word(verify: bool) -> str:
    return "yes" if verify else ""


def is_writer(store: str) -> bool:
    """Whether this process writes the store itself: as its owner, or as root where there is none yet."""
    try:
        return owner_of(store)[0] == os.geteuid()
    except StoreUnusable:
        if os.path.exists(store):
            raise
        return os.geteuid() == 0 or os.access(os.path.dirname(store), os.W_OK | os.X_OK)


def _pull_here(ref: ImageRef, site: Site, platform: str, name: str, verify: bool, tell: Tell) -> Pulled:
    # The registry client behind this costs a second of imports: only a pull pays for it.
    from hpcctr.image.pull import pull

    result = pull(
        ref,
        site=site,
        platform=platforms.parse(platform) if platform else None,
        name=name or None,
        verify=verify,
        progress=lambda progress: tell(progress.said()),
    )
    record = result.image.record
    return Pulled(
        name=result.name,
        digest=record.digest,
        file_size=record.file_size,
        was_stored=result.was_stored,
        platform=str(record.platform),
    )


def _by_storekeeper(ref: ImageRef, site: Site, platform: str, name: str, verify: bool, tell: Tell) -> Pulled | None:
    """Root, for the site: a file is read here, by root."""
    if ref.is_file:
        return _import(ref, site, platform, name, verify, tell)
    errand = Errand(task="pull", image=str(ref), platform=platform, name=name, verify=_word(verify))
    return _asked(errands.run(errand, site), tell)


def _import(ref: ImageRef, site: Site, platform: str, name: str, verify: bool, tell: Tell) -> Pulled | None:
    """Bytes from here to the storekeeper: an archive as it is, or one image of a layout or registry as an archive."""
    named = ImageRef.parse(name) if name else ref.name_in_store()
    if named.is_file or (name and named.digest):
        raise UsageWrong(
            f"--name {name}: an image is named by repository and tag", hint="for instance --name local/app:1.0"
        )
    wanted = platforms.parse(platform) if platform else platforms.of_this_node()
    with (
        tempfile.TemporaryDirectory(prefix="hpcctr-") as scratch,
        _archive(ref, site, wanted, scratch, tell) as archive,
    ):
        kind, send = archive
        errand = Errand(
            task="import",
            image=kind,
            platform=str(wanted),
            name=str(named),
            source=source_text(ref),
            verify=_word(verify),
        )
        return _asked(errands.run(errand, site, send=send), tell)


@contextlib.contextmanager
def _archive(
    ref: ImageRef, site: Site, wanted: Platform, scratch: str, tell: Tell
) -> Iterator[tuple[str, errands.Send]]:
    """(kind of archive with the image in it, what writes it)."""
    if ref.transport in ("oci-archive", "docker-archive"):
        yield f"{ref.transport}:{ref.layout_ref}".rstrip(":"), lambda sock: _copy(ref.path, sock)
        return
    if ref.transport == "oci":
        files = open_files(ref, scratch)
        assert not isinstance(files, DockerArchive)  # noqa: S101 - oci: is a layout
        layout: LayoutSource = files
        image = find_image(layout, ref, wanted)

        def send_layout(sock: socket.socket) -> None:
            with sock.makefile("wb") as out:
                ociarchive.write(out, layout, image, layout.open_layer, ref.path)

        yield "oci-archive", send_layout
        return
    from hpcctr.image import blobs
    from hpcctr.image.registry import RegistrySource

    with RegistrySource(ref, site.registry) as registry:
        located = registry.image(registry.locate(wanted), wanted)
        total = sum({layer.digest: layer.size for layer in located.layers}.values())
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            tell(Progressed(stage="download", done=done, total=total))

        with blobs.downloaded(registry, located.layers, f"{scratch}/blobs", "own", count) as open_layer:

            def send_image(sock: socket.socket) -> None:
                with sock.makefile("wb") as out:
                    ociarchive.write(out, registry, located, open_layer, ref.familiar)

            yield "oci-archive", send_image


def _copy(path: str, sock: socket.socket) -> None:
    """Uncompressed: who may write the store decompresses nothing of a user's."""
    file = open_regular(path)
    if file is None:
        raise NotAnImage(f"{path}: no such file")
    with file:
        chunks = decompressed(file, path) if is_compressed(file.peek(8)) else iter(lambda: file.read(CHUNK), b"")
        for chunk in chunks:
            sock.sendall(chunk)


def _asked(said: Iterator[object], tell: Tell) -> Pulled | None:
    pulled = None
    for one in said:
        if isinstance(one, Progressed):
            tell(one)
        elif isinstance(one, Pulled):
            pulled = one
    return pulled


def _has_login(ref: ImageRef) -> bool:
    from hpcctr.image.credentials import find_login

    with contextlib.suppress(RegistryFailed):
        return find_login(ref.registry, ref.repository) is not None
    return True


def _note(tell: Tell, text: str) -> None:
    tell(Progressed(stage="note", done=0, total=0, who=text))
