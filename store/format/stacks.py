"""A folder of several archives, one for each stack of a model: encoder and decoder, or vision tower and text model.

The stacks of one model have positions of their own: tokens of the source and of the target, or patches and tokens. So
each has an archive of its own, with its plan, commits and seal. Encoder and decoder have the same examples in the same
order; examples of a tower are images. The folder around them is a Zarr group that names them; it is written before the
first of them is begun, and stays once one is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from residua.store.base.canonical import Json, digest_of
from residua.store.base.errors import PlanError, UnsafeArchiveError
from residua.store.base.naming import named
from residua.store.format.archive_metadata import FORMAT, ROOT, is_archive, read_entry, write_entry
from residua.store.format.create import refuse_occupied
from residua.store.format.site_names import STACKS
from residua.store.storage.destination import BucketFolder, Destination, destination_of


@contextmanager
def making_stacks(place: Destination, stacks: Sequence[str]) -> Iterator[None]:
    """Make a place one that holds the archives of `stacks`, which are made inside the ``with`` block.

    After an error the place is removed again, if it was made here and no archive in it was begun: a run with other
    settings would otherwise be refused for the sake of a folder without rows.

    Raises:
        As `create_stacks`.
    """
    is_ours = create_stacks(place, stacks)
    try:
        yield
    except Exception:  # whatever the dataset, the model or the caller's function raises
        if is_ours and all(place.n_bytes(f"{name}/{ROOT}") is None for name in stacks):
            place.remove_all()
        raise


def create_stacks(place: Path | Destination, stacks: Sequence[str]) -> bool:
    """Make a place one that holds the archives of `stacks`; it may be one of the same stacks already.

    Args:
        place: The folder, here or in a bucket.
        stacks: Names of the stacks.

    Returns:
        Whether it was made by this call.

    Raises:
        FileExistsError: `place` exists, with other contents.
        PlanError: It holds an archive, or those of other stacks.
    """
    out = destination_of(place)
    if isinstance(out, BucketFolder) and out.n_bytes(ROOT) is not None:
        out.fetch([ROOT])
    if is_archive(out.path):
        found = stacks_in(out.path)
        if found != tuple(stacks):
            what = f"the stacks {' and '.join(found)}" if found else "one stack, or of a model that has no stacks"
            raise PlanError(
                f"{out} was begun as an archive of {what}, and this run captures {' and '.join(stacks)}: run it "
                f"with the same sites to go on, or choose another {named('out')}"
            )
        return False
    refuse_occupied(out.path)
    entry: dict[str, Json] = {"format": FORMAT, "stacks": list(stacks)}
    write_entry(out.path, {**entry, "sha256": digest_of(entry)})
    if isinstance(out, BucketFolder):
        return out.create(ROOT, (out.path / ROOT).read_bytes())
    return True


def stacks_in(folder: Path) -> tuple[str, ...]:
    """Return the stacks whose archives `folder` holds, in the model's order; empty if it is itself an archive.

    Raises:
        FileNotFoundError: There is neither.
        DamagedArchiveError: The metadata does not match its own SHA-256.
        UnsafeArchiveError: It is not metadata that Residua writes, or of a newer format.
    """
    entry = read_entry(folder)
    if "stacks" not in entry:
        return ()
    stacks = entry["stacks"]
    if not isinstance(stacks, list) or not stacks or not all(isinstance(name, str) for name in stacks):
        raise UnsafeArchiveError(f"{folder}: stacks is not a list of names")
    unknown = [name for name in stacks if name not in STACKS]
    if unknown or len(set(stacks)) != len(stacks):
        raise UnsafeArchiveError(f"{folder}: stacks names {stacks}; each of {', '.join(STACKS)} may be named once")
    return tuple(stacks)
