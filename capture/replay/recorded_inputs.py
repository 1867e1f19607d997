"""Examples that ran with more than tokens and mask: images, token types, boxes, embeddings.

An archive keeps the names of these inputs, and the values of those that are small: whole numbers, one for an example or
few for each token. A replay gives the model these again. It refuses the others, unless the caller gives them.
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from residua.capture.forward.plan_batch import PlanBatch
from residua.capture.sites.frames import FRAMES
from residua.store.base.errors import PlanError, UnsafeArchiveError, few
from residua.store.base.naming import named
from residua.store.examples.index import INPUT_PREFIX, OTHER_INPUTS, SOURCE_SHA256, has_no_tokens
from residua.store.format.plan import STACK_RULE
from residua.store.format.row_columns import HAS_IMAGES
from residua.store.read.archive import Archive

_MOST_AXES = 2  # of an input of one example: its tokens, and few numbers of each
_OWN = ("input_ids", "attention_mask", "inputs_embeds", "past_key_values", "labels", "use_cache", "return_dict")


class RecordedInputs:
    """What the examples of an archive were recorded with beside tokens and mask.

    Args:
        archive: The archive; None for a run, which has no inputs but those that the caller gives.
        model: The model that will take them.
        given: Inputs that the caller gives, by name.
        force: Let examples run without inputs that are not there. Examples without tokens never run.

    Raises:
        PlanError: The model takes no input that is given.
    """

    def __init__(
        self,
        archive: Archive | None,
        model: nn.Module,
        *,
        given: Mapping[str, Tensor] | None = None,
        force: bool = False,
    ) -> None:
        self.given = dict(given or {})
        self._archive = archive
        self._force = force
        known = {*inspect.signature(model.forward).parameters, *(each for names in self._names for each in names or ())}
        for name in self.given:
            if name in _OWN or name not in known:
                raise PlanError(
                    f"inputs has {name}, which is no further input of {type(model).__name__}: leave it out, or correct "
                    "its name. Tokens and mask are given to the model anyway"
                )

    @cached_property
    def _names(self) -> list[list[str] | None]:
        """The names of each example's inputs; empty for an archive that has none."""
        if self._archive is None:
            return []
        table = self._archive.example_table
        plan = self._archive.plan
        if STACK_RULE in plan.rules and SOURCE_SHA256 in table.column_types():
            return [[FRAMES] for _ in range(len(table))]
        has_others = plan.rules.get("loop") == "user" or plan.is_replay or self.has_images
        if not has_others or table.column_types().get(OTHER_INPUTS) != pa.list_(pa.string()):
            return []
        names: list[list[str] | None] = table.table([OTHER_INPUTS])[OTHER_INPUTS].to_pylist()
        return names

    @cached_property
    def _values(self) -> dict[str, list[object]]:
        """The values that the archive keeps, by name, one entry for each example."""
        if self._archive is None:
            return {}
        table = self._archive.example_table
        named = {name for names in self._names for name in names or ()} - set(_OWN)
        columns = {name: f"{INPUT_PREFIX}{name}" for name in named if f"{INPUT_PREFIX}{name}" in table.column_types()}
        if not columns:
            return {}
        found = table.table(list(columns.values()))
        return {name: found[column].to_pylist() for name, column in columns.items()}

    @property
    def _place(self) -> str:
        return "this run" if self._archive is None else self._archive.place

    def _missing(self, example: int) -> list[str]:
        """Return the inputs of an example that neither the archive nor the caller has."""
        names = self._names[example] if self._names else None
        return [
            name
            for name in names or ()
            if name not in self.given and (name not in self._values or self._values[name][example] is None)
        ]

    @property
    def notes(self) -> list[str]:
        """One sentence for the inputs that are left out because `force` allows it."""
        if not self._force:
            return []
        left_out = sorted({name for example in range(len(self._names)) for name in self._missing(example)})
        if not left_out:
            return []
        return [f"examples were recorded with {few(left_out)}, and run without, as force=True allowed"]

    @property
    def has_others(self) -> bool:
        """Whether examples were recorded with more than tokens and mask."""
        return bool(self._names)

    @property
    def has_images(self) -> bool:
        """Whether the examples are those of a dataset with images: their model numbered positions itself."""
        return self._archive is not None and HAS_IMAGES in self._archive.plan.dataset

    @property
    def _remedy(self) -> str:
        return "images= and processor= (or inputs=)" if self.has_images else "inputs="

    def require(self, examples: Sequence[int]) -> None:
        """Raise PlanError if one of these examples cannot run again from what the archive and the caller have."""
        if self._archive is None:
            return
        for number in examples:
            if has_no_tokens(self._archive.example_table.tokens(number)):
                raise PlanError(
                    f"example {number} of {self._place} has no tokens, because it was recorded from images, "
                    "embeddings or other inputs, which are not stored: only examples with tokens can be replayed"
                )
            if not self._force and (missing := self._missing(number)):
                raise PlanError(
                    f"example {number} of {self._place} was recorded with {few(missing)}, which an archive "
                    f"does not store, so a replay would run the model on other inputs: give them by {self._remedy} of "
                    f"residua.replay, choose examples without, or run without them by {named('force', True)}, which is "
                    "noted"
                )

    def refuse(self, examples: Sequence[int], what: str) -> None:
        """Raise PlanError if the archive keeps inputs of one of these examples, for a job that does not give them."""
        if self.given:
            raise PlanError(f"{few(list(self.given))} was given by inputs=, and {what} gives the model tokens alone")
        for number in examples:
            kept = [name for name, values in self._values.items() if values[number] is not None]
            if kept:
                raise PlanError(
                    f"example {number} of {self._place} was recorded with {few(kept)}, and {what} gives the "
                    "model tokens and mask alone: choose examples without, or use residua.replay, which gives it all"
                )

    def of(self, batch: PlanBatch) -> dict[str, Tensor]:
        """Return what the archive keeps for a batch, padded as its tokens are, int64 on their device.

        Raises:
            PlanError: Some of the examples ran with an input and others without.
            UnsafeArchiveError: Values do not fit the tokens.
        """
        found = {}
        for name, values in self._values.items():
            if name in self.given or all(values[example.example] is None for example in batch.rows):
                continue
            found[name] = self._padded(name, values, batch)
        return found

    def _padded(self, name: str, values: Sequence[object], batch: PlanBatch) -> Tensor:
        arrays: dict[int, npt.NDArray[np.int64]] = {}
        for number, row in enumerate(batch.rows):
            if values[row.example] is not None:
                arrays[number] = self._array(name, values[row.example])
            elif not name.endswith("token_type_ids"):  # a model without them takes zeros
                raise PlanError(
                    f"example {row.example} of {self._place} was recorded without {name}, and others that are "
                    "to run with it had it: replay them one after another"
                )
        shapes = {(array.ndim, *array.shape[1:]) for array in arrays.values()}
        fits = all(
            array.ndim == 0 or len(array) == len(batch.rows[number].input_ids) for number, array in arrays.items()
        )
        if len(shapes) != 1 or not fits:
            raise UnsafeArchiveError(
                f"{self._place}: column {INPUT_PREFIX}{name} has not one entry for each token or example"
            )
        ((n_axes, *of_token),) = shapes
        padded = np.zeros((len(batch.rows), *((batch.n_positions, *of_token) if n_axes else ())), np.int64)
        for number, array in arrays.items():
            padded[(number, batch.rows[number].padded) if n_axes else number] = array
        return torch.from_numpy(padded).to(batch.padded.input_ids.device)

    def _array(self, name: str, value: object) -> npt.NDArray[np.int64]:
        try:
            found = np.asarray(value)
        except ValueError:  # lists of different lengths
            found = np.array(None)
        if found.dtype.kind != "i" or found.ndim > _MOST_AXES:
            raise UnsafeArchiveError(f"{self._place}: column {INPUT_PREFIX}{name} holds no plain whole numbers")
        return found.astype(np.int64)
