"""Examples of a user's own loop that ran with more than tokens and mask: images, token types, embeddings.

An archive keeps the names of these inputs and not their values, so a replay would run the model on something else.
"""

from collections.abc import Sequence
from functools import cached_property

import pyarrow as pa

from residua.store.base.errors import PlanError, few
from residua.store.examples.index import OTHER_INPUTS, has_no_tokens
from residua.store.read.archive import Archive, is_replay


class RecordedInputs:
    """What the examples of an archive were recorded with beside tokens and mask.

    Args:
        archive: The archive.
        force: Let examples run without these inputs. Examples without tokens never run.
    """

    def __init__(self, archive: Archive, *, force: bool = False) -> None:
        self._archive = archive
        self._force = force

    @cached_property
    def _names(self) -> list[list[str] | None]:
        """The names of each example's inputs; empty for an archive that has none."""
        table = self._archive.example_table
        is_loop = self._archive.plan.rules.get("loop") == "user" or is_replay(self._archive)
        if not is_loop or table.column_types().get(OTHER_INPUTS) != pa.list_(pa.string()):
            return []
        names: list[list[str] | None] = table.table([OTHER_INPUTS])[OTHER_INPUTS].to_pylist()
        return names

    @property
    def notes(self) -> list[str]:
        """One sentence for the inputs that are left out because `force` allows it."""
        left_out = sorted({name for names in self._names for name in names or ()}) if self._force else []
        if not left_out:
            return []
        return [f"examples were recorded with {few(left_out)}, and run without, as force=True allowed"]

    def require(self, examples: Sequence[int]) -> None:
        """Raise PlanError if one of these examples cannot run again from its tokens alone."""
        names = self._names
        for number in examples:
            if has_no_tokens(self._archive.example_table.tokens(number)):
                raise PlanError(
                    f"example {number} of {self._archive.path} has no tokens, because it was recorded from embeddings "
                    "or other inputs, which are not stored: only examples with tokens can be replayed"
                )
            if not self._force and names and names[number]:
                raise PlanError(
                    f"example {number} of {self._archive.path} was recorded with {few(names[number] or [])}, which an "
                    "archive does not store, so a replay would run the model on other inputs: choose examples without, "
                    "or run without these inputs by force=True or --force, which is noted"
                )
