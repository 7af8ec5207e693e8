"""The names an image has beside the one it was asked for by. Somebody who says a digest says no name, and a rule that
denies a name is to hold all the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

from hpcctr.image.imagefile import store_unusable
from hpcctr.image.platform import of_file_word, of_this_node
from hpcctr.image.record import StoredImage
from hpcctr.image.reference import ImageRef
from hpcctr.image.shelves import as_owner
from hpcctr.image.store import Store
from hpcctr.policy.rules import Rule


def other_names(rules: Sequence[Rule], store: str, image: StoredImage) -> tuple[str, ...]:
    """The names in the store for everyone that mean, or have meant, an image that was asked for by its digest.

    None where no deny rule is about names, and none of a private image: what a user calls it is the user's to change.
    ``NAME@DIGEST`` costs a look at the tags of NAME, a digest alone one at every name. Raises :class:`StoreUnusable`.
    """
    if image.is_private or not any(_denies_by_name(rule) for rule in rules):
        return ()
    digest = image.record.digest
    if image.name.startswith("sha256:"):
        with as_owner(store):
            return tuple(
                text
                for text, _, record in Store.open(store).names()
                if any(entry.digest == digest for entry in record.history)
            )
    named = ImageRef.parse(image.name)
    if not named.digest:
        return ()
    with as_owner(store):
        return tuple(_tags_of(Store.open(store), named))


def _tags_of(store: Store, named: ImageRef) -> Iterator[str]:
    """The tags of a repository that mean, or have meant, its digest."""
    directory = os.path.dirname(store.name_file(named, of_this_node()))
    try:
        entries = sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise store_unusable(directory, error) from None
    for entry in entries:
        tag, _, architecture = entry.removesuffix(".json").rpartition(".")
        if not entry.endswith(".json") or not tag or tag.startswith((".", "@")):
            continue
        tagged = replace(named, tag=tag, digest="")
        record = store.name_record(tagged, of_file_word(architecture))
        if record is not None and any(known.digest == named.digest for known in record.history):
            yield str(tagged)


def _denies_by_name(rule: Rule) -> bool:
    return rule.action == "deny" and ("*" not in rule.images or rule.registries is not None)
