"""What each kind of edit does to rows: one function for each kind, whose docstring states where it rounds.

A function makes the action of one edit at one site; whatever can be checked without the rows is checked there. Values
are combined in the model's own type, as a hook by hand would do it, unless the docstring says otherwise. An entry that
an edit changes by nothing keeps its bits.

Sources: mean ablation (Wang et al. 2022), activation addition (Turner et al. 2023), directional ablation
(Arditi et al. 2024), interchange of rows between examples (Geiger et al. 2021), the tuned lens (Belrose et al. 2023).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from residua.capture.buffers.row_index import Indices
from residua.capture.edits.action import (
    Action,
    Change,
    ChosenRows,
    EditContext,
    SiteRows,
    StoredRows,
    dtype_name,
    widen,
)
from residua.capture.hooks.site import SiteInfo
from residua.capture.runtime.collectives import is_alone
from residua.store.base.canonical import digest_of
from residua.store.base.errors import NotCapturedError, PlanError
from residua.store.edits.archive_values import class_members, column_classes
from residua.store.edits.edit import (
    Add,
    Edit,
    FromOverlay,
    Function,
    Mean,
    Noise,
    ProjectOut,
    Scale,
    Set,
    Swap,
    Through,
    Zero,
)
from residua.store.edits.lens_files import read_linear_map
from residua.store.edits.overlay import Overlay
from residua.store.edits.places import Place
from residua.store.edits.vectors import Vector
from residua.store.examples.memory import ExampleSource
from residua.store.format.plan import STACK_RULE
from residua.store.read import stacks as stores
from residua.store.read.archive import Archive
from residua.store.read.rows_in_shards import Array
from residua.store.selection.grammar import Value

Floats = npt.NDArray[np.float64]

_MOST_MEAN_BYTES = 2**28  # of means in memory: a column may have a class for each example


def _zero(_edit: Zero, _info: SiteInfo, _context: EditContext) -> Action:
    return _always(torch.zeros_like)


def _scale(edit: Scale, _info: SiteInfo, _context: EditContext) -> Action:
    return _always(lambda rows: rows * edit.by)


def _add(edit: Add, info: SiteInfo, context: EditContext) -> Action:
    """Compute scale * vector in float64, round it to the model's type, and add it there."""
    with np.errstate(over="ignore"):  # `_row_value` refuses what overflows
        values = edit.vector.values * edit.scale
    delta = _row_value(values, info, context.dtype, "the vector")
    return _always(lambda rows: _plus(rows, delta.to(rows)))


def _plus(rows: Tensor, delta: Tensor) -> Tensor:
    """Add only where delta is not 0: adding 0 would turn -0 into 0."""
    return torch.where(delta == 0, rows, rows + delta)


def _set(edit: Set, info: SiteInfo, context: EditContext) -> Action:
    if isinstance(edit.to, str):
        return _stored_rows(context.stored, info, context.dtype, lambda chosen: chosen.row)
    if isinstance(edit.to, Vector):
        return _fill(_row_value(edit.to.values, info, context.dtype, "the vector"))
    return _fill(_row_value(np.full(_row_shape(info)[-1:], edit.to), info, context.dtype, "the number"))


def _project_out(edit: ProjectOut, info: SiteInfo, _context: EditContext) -> Action:
    """Subtract the projection onto the span of the directions, in float32 at least; round once at the end.

    Directions as wide as all heads together are of the full row, and those as wide as one head of each head.
    """
    shape = _row_shape(info)
    width, full = shape[-1], prod(shape)
    given = np.atleast_2d(edit.directions.values)
    is_full = given.ndim == 2 and given.shape[1] == full
    if given.ndim != 2 or not (is_full or given.shape[1] == width):
        raise PlanError(f"{info.name} has rows of width {width}, and the directions have shape {given.shape}")
    _, sizes, span = np.linalg.svd(given, full_matrices=False)
    rank = int((sizes > sizes.max() * max(given.shape) * np.finfo(np.float64).eps).sum()) if sizes.max() else 0
    if not rank:
        raise PlanError("the directions are all 0: give at least one vector that is not 0")
    basis = torch.from_numpy(span[:rank])

    def change(rows: Tensor) -> Tensor:
        wide = widen(rows).flatten(1) if is_full else widen(rows)
        directions = basis.to(wide)
        return (wide - (wide @ directions.T) @ directions).to(rows.dtype).view_as(rows)

    return _always(change)


def _noise(edit: Noise, info: SiteInfo, context: EditContext) -> Action:
    """Draw each token from a generator of its own (Philox: Salmon et al. 2011): batch and rank do not matter."""
    key = np.array([edit.seed, int(digest_of(info.name)[:16], 16)], np.uint64)
    _row_value(np.full(_row_shape(info)[-1:], edit.std), info, context.dtype, "std")

    def act(chosen: ChosenRows) -> Change:
        def change(rows: Tensor) -> Tensor:
            drawn = np.empty(rows.shape, np.float64)
            tokens = zip(chosen.example.tolist(), chosen.position.tolist(), strict=True)
            for index, (example, position) in enumerate(tokens):
                stream = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, position, example]))
                drawn[index] = stream.standard_normal(rows.shape[1:])
            return _plus(rows, torch.from_numpy(drawn * edit.std).to(rows))

        return change

    return act


def _through(edit: Through, info: SiteInfo, _context: EditContext) -> Action:
    """Apply the lens's affine map in float32 at least; round once at the end."""
    assert isinstance(edit.lens, Path)  # noqa: S101  # `prepare_edits` has brought it here
    weight, bias = read_linear_map(edit.lens, info.site)
    if not bool(torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise PlanError(f"the lens at {edit.lens} holds NaN or infinite numbers at {info.name}")
    if info.row_shape != (len(bias),):
        raise PlanError(f"{edit.lens} is a lens of width {len(bias)}, and {info.name} has rows of {info.row_shape}")

    def change(rows: Tensor) -> Tensor:
        wide = widen(rows)
        return (wide + wide @ weight.to(wide).T + bias.to(wide)).to(rows.dtype)

    return _always(change)


def _function(edit: Function, info: SiteInfo, _context: EditContext) -> Action:
    def change(rows: Tensor) -> Tensor:
        new = edit.function(info.name, rows)
        if not isinstance(new, Tensor) or (new.shape, new.dtype) != (rows.shape, rows.dtype):
            found = f"{new.dtype}{list(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
            raise PlanError(f"the function returned {found} for {rows.dtype}{list(rows.shape)} at {info.name}")
        return new

    return _always(change)


class _ClassMeans:
    """Mean rows of the classes of a column: of all classes in one pass, or, if they take too much, of a batch's."""

    def __init__(self, rows: SiteRows, info: SiteInfo, column: str) -> None:
        self._rows, self._site, self._column = rows, info.name, column
        self._members = class_members(rows.source.example_table, column)
        self._most = max(1, _MOST_MEAN_BYTES // (8 * prod(_row_shape(info))))
        self._found: dict[Value, Floats | None] = {}

    def __call__(self, keys: Sequence[Value]) -> dict[Value, Floats | None]:
        """Return the mean row of each class; None if no row is captured yet.

        Raises:
            PlanError: The archive has no such class.
        """
        for key in keys:
            if key not in self._members:
                raise PlanError(
                    f"the mean of rows with {self._column} == {key!r} was asked for, and {self._rows.source.place} "
                    "has no such example"
                )
        if not all(key in self._found for key in keys):
            wanted = list(self._members) if len(self._members) <= self._most else keys
            examples = [self._members[key] for key in wanted]
            self._found = dict(zip(wanted, self._rows.means(self._site, examples), strict=True))
        return {key: self._found[key] for key in keys}


def _mean(edit: Mean, info: SiteInfo, context: EditContext) -> Action:
    """Compute the mean in float64 and round it to the model's type."""
    rows = context.stored if edit.archive is None else StoredRows(open_archive(edit.archive, context.stored.source))
    rows.require_site(info)
    if edit.column is None:
        (found,) = rows.means(info.name, [None])
        if found is None:
            raise NotCapturedError(f"{rows.source.place} has no captured row of {info.name} to take the mean of")
        return _fill(_row_value(found, info, context.dtype, "the mean"))
    classes = column_classes(context.stored.source.example_table, edit.column)
    means_of = _ClassMeans(rows, info, edit.column)

    def mean(key: Value, row: Floats | None) -> Tensor:
        what = f"the mean of rows with {edit.column} == {key!r}"
        if row is None:
            place = rows.source.place
            raise NotCapturedError(f"{what}: {place} has no captured row of {info.name} to take the mean of")
        return _row_value(row, info, context.dtype, what)

    def act(chosen: ChosenRows) -> Change:
        keys = [classes[example] for example in chosen.example.tolist()]
        class_index = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        means = torch.stack([mean(key, row) for key, row in means_of(list(class_index)).items()])
        index = torch.tensor([class_index[key] for key in keys])
        return lambda old: means[index].to(old)

    return act


def _swap(edit: Swap, info: SiteInfo, context: EditContext) -> Action:
    source = context.stored if edit.archive is None else StoredRows(open_archive(edit.archive, context.stored.source))
    return _stored_rows(source, info, context.dtype, lambda chosen: chosen.from_row)


def _stored_rows(
    source: SiteRows, info: SiteInfo, dtype: torch.dtype, rows_of: Callable[[ChosenRows], Indices]
) -> Action:
    """Replace rows by stored ones; only the process that has the site reads them."""
    source.require_site(info)

    def act(chosen: ChosenRows) -> Change:
        numbers = rows_of(chosen)
        source.require(info.name, numbers, dtype)
        return lambda rows: source.read(info.name, numbers).to(rows)

    return act


def _from_overlay(edit: FromOverlay, info: SiteInfo, context: EditContext) -> Action:
    """Put in the rows that the overlay has; other rows stay."""
    source = context.stored.source
    if not isinstance(source, Archive):
        raise PlanError(f"an overlay holds rows of an archive, and {source.place} has none: replay the archive")
    try:
        overlay = Overlay(edit.overlay, source)
    except FileNotFoundError as error:
        raise PlanError(str(error)) from error
    _ = overlay[info.name]  # raises if the overlay lacks the site

    def act(chosen: ChosenRows) -> Change:
        read = cache(lambda: overlay.read(info.name, chosen.row))
        if is_alone():
            _check_overlay(overlay, info, context.dtype, chosen, *read())

        def change(rows: Tensor) -> Tensor:
            values, is_there = read()
            mask = torch.from_numpy(is_there).to(rows.device).view(-1, *[1] * (rows.ndim - 1))
            return torch.where(mask, torch.from_numpy(values).to(rows), rows)

        return change

    return act


def _check_overlay(
    overlay: Overlay,
    info: SiteInfo,
    dtype: torch.dtype,
    chosen: ChosenRows,
    values: Array,
    is_there: npt.NDArray[np.bool_],
) -> None:
    """Raise PlanError if a row of an overlay holds NaN or a number that `dtype` cannot hold."""
    sizes = np.abs(values.reshape(len(values), -1)).max(axis=1, initial=0.0)  # NaN where any is
    wrong = np.flatnonzero(is_there & ~(sizes <= torch.finfo(dtype).max))
    if len(wrong):
        raise PlanError(
            f"{overlay.path}: row {int(chosen.row[wrong[0]]):,} of {info.name} reaches {sizes[wrong[0]]:.3g}, which is "
            f"no number that {dtype_name(dtype)} can hold: write finite numbers, or NaN in every entry of a row that "
            "is to stay as it is"
        )


ACTIONS: Mapping[type[Edit], Callable[[Any, SiteInfo, EditContext], Action]] = {
    Zero: _zero,
    Mean: _mean,
    Add: _add,
    Set: _set,
    Scale: _scale,
    ProjectOut: _project_out,
    Noise: _noise,
    Swap: _swap,
    Through: _through,
    FromOverlay: _from_overlay,
    Function: _function,
}
"""From the kind of an edit to the function that makes its action at a site.

Each raises PlanError where the edit does not fit the site, and NotCapturedError for rows that are not captured yet.
"""


def open_archive(place: Place, edited: ExampleSource) -> Archive:
    """Open an archive that an edit names; of several stacks, the one of the stack that is edited.

    Args:
        place: Its folder or address.
        edited: The archive or run whose rows the edit changes.

    Raises:
        PlanError: There is none, or it has no rows of that stack.
    """
    try:
        address = place if isinstance(place, Path) else place.address
        found = stores.open_archive(address, storage_options=None if isinstance(place, Path) else place.options)
    except FileNotFoundError as error:
        raise PlanError(f"there is no archive at {place}") from error
    if not found.stacks:
        return found
    stack = str(edited.plan.rules.get(STACK_RULE, "")) if isinstance(edited, Archive) else ""
    if stack not in found.stacks:
        raise PlanError(f"{place} holds {' and '.join(found.stacks)}, and rows of {stack or 'one stack'} are needed")
    return found.stacks[stack]


def _always(change: Change) -> Action:
    """Return the action that makes the same change whatever the rows are."""
    return lambda _chosen: change


def _fill(value: Tensor) -> Action:
    """Return the action that replaces every row by `value`."""
    return _always(lambda rows: value.to(rows).expand_as(rows).clone())


def _row_value(values: npt.NDArray[np.float64], info: SiteInfo, dtype: torch.dtype, what: str) -> Tensor:
    """Return float64 values, one row or its last axis, as a tensor of `dtype`.

    Raises:
        PlanError: The shape does not fit the site's rows, a value is NaN, or `dtype` cannot hold it.
    """
    shape = _row_shape(info)
    values = _as_row(values, shape)
    if values.shape not in (shape, shape[-1:]):
        several = values.ndim == 2 and values.shape[1:] in (shape[-1:], (prod(shape),))
        advice = f": these are {len(values)} vectors, and one is needed, such as coef_[0]" if several else ""
        raise PlanError(f"{info.name} has rows of shape {shape}, and {what} has shape {tuple(values.shape)}{advice}")
    largest = float(np.abs(values).max(initial=0.0))
    if np.isnan(largest):
        raise PlanError(f"{what} is NaN at {info.name}: its rows hold NaN or infinite values")
    if largest > torch.finfo(dtype).max:
        raise PlanError(f"{what} reaches {largest:.3g}, more than {dtype_name(dtype)} can hold at {info.name}")
    return torch.from_numpy(values).to(dtype)


def _as_row(values: Floats, shape: tuple[int, ...]) -> Floats:
    """Return one vector in the shape of a row, if it is one of a probe: (1, width), or with its heads joined."""
    while values.ndim > 1 and len(values) == 1 and values.shape != shape:
        values = values[0]
    return values.reshape(shape) if len(shape) > 1 and values.shape == (prod(shape),) else values


def _row_shape(info: SiteInfo) -> tuple[int, ...]:
    """Return the shape of a row; 0 stands for an axis as long as the example."""
    return tuple(size or 0 for size in info.row_shape or ())
