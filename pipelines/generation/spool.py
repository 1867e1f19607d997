"""What was generated, kept as it comes: a hidden folder beside the archive, from which a stopped run goes on.

    .NAME.generated/
      made.json                 what is generated: the model, the settings and the digest of the prompts
      prompts/part-*.parquet    the prompts, an example table; written again by each run
      continuations/N.json      the new tokens of unit N: a batch of prompts, or several that run one by one

For an archive in a bucket the folder is there, beside it. A file appears complete or not at all. Its tokens are
compared with a checksum when they are read, and a file that is not what this run would write is generated again. The
folder goes when the archive is complete.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from residua.store.base.canonical import Json, canonical_json, differences, flatten
from residua.store.base.errors import CaptureError, PlanError
from residua.store.base.naming import named
from residua.store.base.untrusted import parse_json
from residua.store.examples.index import IntArray
from residua.store.examples.table import ExampleTable
from residua.store.storage.crc import crc32c
from residua.store.storage.destination import BucketFolder, Destination, DiskFolder

MADE, PROMPTS, CONTINUATIONS = "made.json", "prompts", "continuations"

_MAX_MADE_BYTES = 2**20
_BYTES_PER_NUMBER = 12  # digits of an int32, a comma and a space
_BYTES_AROUND = 200


class Spool:
    """The folder of one archive's continuations.

    Args:
        archive: Where the archive is written.
        n_new: Most new tokens of a prompt.
        vocab_size: Token ids lie below it.
    """

    def __init__(self, archive: Destination, *, n_new: int, vocab_size: int) -> None:
        name = f".{archive.name}.generated"
        self._place: Destination
        if isinstance(archive, BucketFolder):
            parent = str(archive).rstrip("/").rpartition("/")[0]
            self._place = BucketFolder(f"{parent}/{name}", archive.objects.options)
        else:
            self._place = DiskFolder(archive.path.with_name(name))
        self._n_new = n_new
        self._vocab_size = vocab_size

    def __str__(self) -> str:
        return str(self._place)

    @property
    def prompts(self) -> Path:
        """The local folder of the prompts."""
        return self._place.path / PROMPTS

    def begin(self, made: Mapping[str, Json]) -> None:
        """Keep what is generated; compare it with that of the run that goes on here.

        Raises:
            PlanError: Continuations are there, and are of another model, other settings or other prompts.
        """
        known = self._known()
        if known == made:
            return
        names = self._place.names(CONTINUATIONS)
        if known is None and names:  # a run was killed while it removed the folder
            self._place.remove(f"{CONTINUATIONS}/{name}" for name in names)
        elif names:
            listed = "\n  ".join(differences(flatten(known or {}), flatten(made), ("there", "this run")))
            raise PlanError(
                f"{self} holds {len(names)} batches of text that was generated otherwise:\n  {listed}\n"
                f"Run it as it was begun to go on, remove {self} to generate anew, or choose another {named('out')}."
            )
        self._place.write(MADE, [canonical_json(made)])

    def share_prompts(self) -> None:
        """Send the prompts that were written to the local folder to where all workers find them."""
        self._place.upload([f"{PROMPTS}/{path.name}" for path in sorted(self.prompts.glob("part-*"))])

    def table(self) -> ExampleTable:
        """Return the prompts."""
        if isinstance(self._place, BucketFolder):
            self._place.fetch(f"{PROMPTS}/{name}" for name in sorted(self._place.names(PROMPTS)))
        return ExampleTable(self.prompts)

    def made(self) -> Mapping[str, Json]:
        """Return what is generated, as the first worker wrote it.

        Raises:
            CaptureError: It is not there.
        """
        found = self._known()
        if found is None:
            raise CaptureError(f"{self}/{MADE} is missing or damaged: run the same command again")
        return found

    def done(self) -> frozenset[int]:
        """Return the units that are generated, by any worker."""
        stems = (name.removesuffix(".json") for name in self._place.names(CONTINUATIONS))
        return frozenset(int(stem) for stem in stems if stem.isascii() and stem.isdigit())

    def write(self, unit: int, prompts: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Keep the new tokens of a unit's prompts."""
        content: dict[str, Json] = {"prompts": list(prompts), "tokens": [list(each) for each in tokens]}
        text = canonical_json({**content, "crc32c": crc32c(canonical_json(content))})
        self._place.write(f"{CONTINUATIONS}/{unit}.json", [text])

    def read(self, unit: int, prompts: Sequence[int]) -> list[IntArray]:
        """Return the new tokens of each prompt of a unit, int32.

        Raises:
            CaptureError: The file is missing or is not one that this run writes.
        """
        name = f"{CONTINUATIONS}/{unit}.json"
        most = len(prompts) * (self._n_new + 2) * _BYTES_PER_NUMBER + _BYTES_AROUND
        try:
            return self._checked(parse_json(self._read(name, most)), prompts)
        except (ValueError, TypeError, OverflowError, OSError) as error:
            raise CaptureError(f"{self}/{name} cannot be used ({error}): run the same command again") from error

    def drop_damaged(self, units: Sequence[Sequence[int]]) -> int:
        """Remove files that this run would not write, so that they are made again; return how many there were."""
        damaged = []
        for unit in self.done():
            try:
                self.read(unit, units[unit])
            except (CaptureError, IndexError):
                damaged.append(f"{CONTINUATIONS}/{unit}.json")
        if damaged:
            self._place.remove(damaged)
        return len(damaged)

    def clear_prompts(self) -> None:
        """Remove the prompts that an earlier run left."""
        names = [f"{PROMPTS}/{name}" for name in self._place.names(PROMPTS)]
        if names:
            self._place.remove(names)

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        self._place.remove_all()

    def _known(self) -> Mapping[str, Json] | None:
        if self._place.n_bytes(MADE) is None:
            return None
        try:
            found = parse_json(self._read(MADE, _MAX_MADE_BYTES))
        except (ValueError, OSError):
            return {}  # damaged: other than anything that a run writes
        return found if isinstance(found, dict) else {}

    def _read(self, name: str, most_bytes: int) -> bytes:
        if isinstance(self._place, BucketFolder):
            return self._place.objects.read(name, most_bytes)
        path = self._place.path / name
        if (size := path.stat().st_size) > most_bytes:
            raise ValueError(f"it has {size:,} bytes, and at most {most_bytes:,} are written there")
        return path.read_bytes()

    def _checked(self, found: object, prompts: Sequence[int]) -> list[IntArray]:
        if not isinstance(found, dict) or set(found) != {"prompts", "tokens", "crc32c"}:
            raise ValueError("it does not hold prompts, tokens and their checksum")
        checksum = found.pop("crc32c")
        if checksum != crc32c(canonical_json(found)):
            raise ValueError("its checksum is another")
        if found["prompts"] != list(prompts) or len(found["tokens"]) != len(prompts):
            raise ValueError("it is of other prompts")
        tokens = [np.array(each, np.int64) for each in found["tokens"]]
        for each in tokens:
            if (
                each.ndim != 1
                or not 0 < each.size <= self._n_new
                or not 0 <= each.min() <= each.max() < self._vocab_size
            ):
                raise ValueError("it holds something other than new tokens of the model")
        return [each.astype(np.int32) for each in tokens]
