"""Edits whose values come from an archive or an overlay: means, rows of other examples, rows edited elsewhere."""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from residua.capture.buffers.row_index import Indices
from residua.capture.edits.action import Action, Change, Chosen, Surroundings, always, fitting, name_of
from residua.capture.edits.stored_rows import StoredRows
from residua.capture.runtime.collectives import is_alone
from residua.capture.sites.site import SiteInfo
from residua.store.base.errors import NotCapturedError, PlanError
from residua.store.edits.edit import FromOverlay, Mean, Scalar, Swap
from residua.store.edits.means import mean_row
from residua.store.edits.overlay import Overlay
from residua.store.edits.selection import RowChooser
from residua.store.read.archive import Archive
from residua.store.read.reader import Array

_MOST_MEANS = 4096  # that are kept, of a column with a class for each example


def brought(
    source: StoredRows, info: SiteInfo, dtype: torch.dtype, rows_of: Callable[[Chosen], Indices] = lambda at: at.row
) -> Action:
    """Put rows of an archive in the place of others; the process that meets the site reads them."""
    _require_site(source.archive, info)

    def act(at: Chosen) -> Change:
        numbers = rows_of(at)
        source.require(info.name, numbers, dtype)
        return lambda rows: _as(rows, source.read(info.name, numbers))

    return act


def mean_of(edit: Mean, info: SiteInfo, around: Surroundings) -> Action:
    """Round the mean, taken in float64, to the model's type."""
    other = None if edit.archive is None else opened(edit.archive)
    archive = around.stored.archive if other is None else other
    _require_site(archive, info)
    if edit.column is None:
        value = fitting(mean_row(archive, info.name), info, around.dtype, "the mean")
        return always(lambda rows: value.to(rows).expand_as(rows).clone())
    classes = around.chooser.classes(edit.column)
    members = (around.chooser if other is None else RowChooser(other)).members(edit.column)

    @lru_cache(_MOST_MEANS)
    def mean(key: Scalar) -> Tensor:
        what = f"the mean of rows with {edit.column} == {key!r}"
        if key not in members:
            raise PlanError(f"{what} was asked for, and {archive.path} has no such example")
        ranges = [archive.example_table.rows(example) for example in members[key]]
        try:
            return fitting(mean_row(archive, info.name, ranges), info, around.dtype, what)
        except NotCapturedError as error:
            raise NotCapturedError(f"{what}: {error}") from error

    def act(at: Chosen) -> Change:
        keys = [classes[example] for example in at.example.tolist()]
        places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        means = torch.stack([mean(key) for key in places])
        index = torch.tensor([places[key] for key in keys])
        return lambda rows: means[index].to(rows)

    return act


def swapped(edit: Swap, info: SiteInfo, around: Surroundings) -> Action:
    """Put in the rows of another example."""
    source = around.stored if edit.archive is None else StoredRows(opened(edit.archive))
    return brought(source, info, around.dtype, lambda at: at.from_row)


def from_overlay(edit: FromOverlay, info: SiteInfo, around: Surroundings) -> Action:
    """Put in the rows that an overlay has; a row that it lacks stays."""
    try:
        overlay = Overlay(edit.overlay, around.stored.archive)
    except FileNotFoundError as error:
        raise PlanError(str(error)) from error
    _ = overlay[info.name]

    def act(at: Chosen) -> Change:
        read = cache(lambda: overlay.read(info.name, at.row))
        if is_alone():
            _refuse_strange(overlay, info, around.dtype, at, *read())

        def change(rows: Tensor) -> Tensor:
            values, there = read()
            new = _as(rows, torch.from_numpy(values))
            is_there = torch.from_numpy(there).to(rows.device).view(-1, *[1] * (rows.ndim - 1))
            return torch.where(is_there, new, rows)

        return change

    return act


def _refuse_strange(
    overlay: Overlay, info: SiteInfo, dtype: torch.dtype, at: Chosen, values: Array, there: npt.NDArray[np.bool_]
) -> None:
    """Raise PlanError if an overlay has a row that cannot be put in."""
    sizes = np.abs(values.reshape(len(values), -1)).max(axis=1, initial=0.0)  # NaN where any is
    wrong = np.flatnonzero(there & ~(sizes <= torch.finfo(dtype).max))
    if len(wrong):
        raise PlanError(
            f"{overlay.path}: row {int(at.row[wrong[0]]):,} of {info.name} reaches {sizes[wrong[0]]:.3g}, which is no "
            f"number that {name_of(dtype)} can hold: write finite ones, or NaN throughout for a row that stays as it is"
        )


def _as(rows: Tensor, stored: Tensor) -> Tensor:
    """Bring stored rows to the type and device of the rows that they replace."""
    return stored.to(device=rows.device, dtype=rows.dtype)


def opened(path: Any) -> Archive:
    """Open an archive that an edit names."""
    try:
        return Archive(path)
    except FileNotFoundError as error:
        raise PlanError(f"there is no archive at {path}") from error


def _require_site(archive: Archive, info: SiteInfo) -> None:
    if info.name not in archive.sites:
        raise PlanError(f"{archive.path} does not store {info.name}; it stores {', '.join(archive.sites)}")
    shape = archive[info.name].shape[1:]
    if shape != info.row_shape:
        raise PlanError(f"{archive.path} has rows of shape {shape} at {info.name}, the model {info.row_shape}")
