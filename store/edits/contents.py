"""What the archives, lenses and overlays that edits name hold: digests of it, and a lens at an address brought here."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path

from residua.store.base.canonical import Json
from residua.store.base.errors import PlanError
from residua.store.edits.edit import Edit, Through
from residua.store.edits.lens_files import CONFIG_FILE, LAYERS_FILE, PARAMETERS_FILE
from residua.store.edits.places import Address
from residua.store.format.commits import content_hash
from residua.store.read.stacks import archives_of, open_archive
from residua.store.storage.mirror import fetched

_LENS_FILES = (CONFIG_FILE, LAYERS_FILE, PARAMETERS_FILE)


def contents_of(edits: Iterable[Edit]) -> dict[str, Json]:
    """Return a digest of each folder and address that edits take values from; it changes when the content does.

    Raises:
        OSError: A file cannot be read.
        DamagedArchiveError: The metadata of an archive were altered.
    """
    found: dict[str, Json] = {}
    for edit in edits:
        for entry in fields(edit):
            place = getattr(edit, entry.name)
            if isinstance(place, Path):
                found[str(place)] = content_hash(place)
            elif isinstance(place, Address):
                found[str(place)] = _content(edit, place)
    return found


def _content(edit: Edit, place: Address) -> str:
    if isinstance(edit, Through):
        with with_lens_here(edit) as here:
            return str(contents_of([here]).popitem()[1])
    archives = archives_of(open_archive(place.address, storage_options=place.options, cache=False))
    return "+".join(str(one.metadata.to_json()["sha256"]) for one in archives)


@contextmanager
def with_lens_here(edit: Edit) -> Iterator[Edit]:
    """Give an edit whose lens is in a folder of this machine: for one at an address, a copy, while the context lasts.

    Tensors that were loaded from it stay.

    Raises:
        PlanError: There is no lens at its address.
        StorageError: The address cannot be read.
    """
    if not isinstance(edit, Through) or isinstance(edit.lens, Path):
        yield edit
        return
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(fetched(edit.lens.address, edit.lens.options, names=_LENS_FILES))
        except FileNotFoundError as error:
            raise PlanError(f"there is no lens at {edit.lens}: name one that `residua lens train` wrote") from error
        yield replace(edit, lens=folder)
