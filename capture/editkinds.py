"""What each kind of edit does to rows: one function a kind, in the order of rounding that its docstring states.

Values are combined in the model's own type, as a hook by hand would, unless said otherwise; what an edit changes by
nothing keeps its bits.

Legend: `N` chosen rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from residua.capture.lensmap import lens_map
from residua.capture.placement import Indices
from residua.capture.siteinfo import SiteInfo
from residua.capture.storedrows import StoredRows
from residua.store.archive import Archive
from residua.store.canonical import digest_of
from residua.store.chosenrows import RowChooser
from residua.store.edits import (
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
from residua.store.errors import PlanError
from residua.store.means import mean_row
from residua.store.overlay import Overlay
from residua.store.vectors import Vector


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The rows of one batch that an edit changes, (N,) each.

    Attributes:
        source: Index into the flattened (examples, positions) axes of the batch.
        example: Number of the example.
        position: Position in the example.
        row: Row of the archive; -1 for a token that the plan left out.
        from_row: Row that takes its place, for edits that bring stored rows.
    """

    source: Indices
    example: Indices
    position: Indices
    row: Indices
    from_row: Indices


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What actions are made of, besides the edit and the site.

    Attributes:
        stored: Rows of the archive.
        chooser: Its examples.
        dtype: The type that the model computes in at the site.
    """

    stored: StoredRows
    chooser: RowChooser
    dtype: torch.dtype


Action = Callable[[Tensor, Chosen], Tensor]
"""Takes rows, (N, *row), and which they are; gives what they become."""


def _zero(_edit: Zero, _info: SiteInfo, _around: Surroundings) -> Action:
    return lambda rows, _at: torch.zeros_like(rows)


def _scale(edit: Scale, _info: SiteInfo, _around: Surroundings) -> Action:
    return lambda rows, _at: rows * edit.by


def _add(edit: Add, info: SiteInfo, around: Surroundings) -> Action:
    """Round scale * vector, computed in float64, to the model's type, then add it there."""
    delta = fitting(edit.vector.values * edit.scale, info, around.dtype, "the vector")
    return lambda rows, _at: _moved(rows, delta.to(rows.device))


def _moved(rows: Tensor, delta: Tensor) -> Tensor:
    """Add where there is something to add: adding 0 would turn -0 into 0."""
    return torch.where(delta == 0, rows, rows + delta)


def _set(edit: Set, info: SiteInfo, around: Surroundings) -> Action:
    if isinstance(edit.to, str):
        _require_stored(around.stored.archive, info.name)
        return lambda rows, at: _as(rows, around.stored.read(info.name, at.row))
    if isinstance(edit.to, Vector):
        value = fitting(edit.to.values, info, around.dtype, "the vector")
    else:
        value = fitting(np.full(_row_shape(info)[-1:], edit.to), info, around.dtype, "the number")
    return lambda rows, _at: value.to(rows.device).expand_as(rows).clone()


def _mean(edit: Mean, info: SiteInfo, around: Surroundings) -> Action:
    """Round the mean, taken in float64, to the model's type."""
    other = None if edit.archive is None else opened(edit.archive)
    archive = around.stored.archive if other is None else other
    _require_stored(archive, info.name)
    width = archive[info.name].shape[1:]
    if width != info.row_shape:
        raise PlanError(f"{archive.path} has rows of shape {width} at {info.name}, the model {info.row_shape}")
    chooser = around.chooser if other is None else RowChooser(other)
    for asked in (chooser, around.chooser) if edit.column is not None else ():
        asked.column(edit.column or "")
    means: dict[object, Tensor] = {}

    def mean(key: object, rows: Tensor) -> Tensor:
        if key not in means:
            ranges = None
            if edit.column is not None:
                values, table = chooser.column(edit.column), archive.example_table
                ranges = [table.rows(number) for number, value in enumerate(values) if value == key]
            found = mean_row(archive, info.name, ranges)
            means[key] = fitting(found, info, around.dtype, "the mean").to(rows.device)
        return means[key]

    def act(rows: Tensor, at: Chosen) -> Tensor:
        if edit.column is None:
            return mean(None, rows).expand_as(rows).clone()
        values = around.chooser.column(edit.column)
        return torch.stack([mean(values[number], rows) for number in at.example.tolist()])

    return act


def _project_out(edit: ProjectOut, info: SiteInfo, _around: Surroundings) -> Action:
    """Subtract, in float32 at least, the part in the span of the directions; round once at the end."""
    shape = _row_shape(info)
    given = np.atleast_2d(edit.directions.values)
    if given.ndim != 2 or given.shape[1] != shape[-1]:
        raise PlanError(f"{info.name} has rows of width {shape[-1]}, and the directions have shape {given.shape}")
    _, sizes, span = np.linalg.svd(given, full_matrices=False)
    rank = int((sizes > sizes.max() * max(given.shape) * np.finfo(np.float64).eps).sum()) if sizes.max() else 0
    if not rank:
        raise PlanError("the directions are 0, which is no direction")
    basis = torch.from_numpy(span[:rank])

    def act(rows: Tensor, _at: Chosen) -> Tensor:
        wide = rows if rows.dtype == torch.float64 else rows.float()
        directions = basis.to(wide)
        return (wide - (wide @ directions.T) @ directions).to(rows.dtype)

    return act


def _noise(edit: Noise, info: SiteInfo, _around: Surroundings) -> Action:
    """Draw for each token by itself, so that it does not matter what stands beside it or on which rank it is."""
    key = np.array([edit.seed, int(digest_of(info.name)[:16], 16)], np.uint64)

    def act(rows: Tensor, at: Chosen) -> Tensor:
        drawn = np.empty(rows.shape, np.float64)
        for place, (example, position) in enumerate(zip(at.example.tolist(), at.position.tolist(), strict=True)):
            stream = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, position, example]))
            drawn[place] = stream.standard_normal(rows.shape[1:])
        return _moved(rows, torch.from_numpy(drawn * edit.std).to(rows))

    return act


def _swap(edit: Swap, info: SiteInfo, around: Surroundings) -> Action:
    source = around.stored if edit.archive is None else StoredRows(opened(edit.archive))
    _require_stored(source.archive, info.name)
    if source.archive[info.name].shape[1:] != info.row_shape:
        raise PlanError(f"{source.archive.path} has rows of another shape than {info.row_shape} at {info.name}")
    return lambda rows, at: _as(rows, source.read(info.name, at.from_row))


def _through(edit: Through, info: SiteInfo, _around: Surroundings) -> Action:
    """Apply the lens's affine map in float32 at least; round once at the end."""
    weight, bias = lens_map(edit.lens, info.site)
    if info.row_shape != (len(bias),):
        raise PlanError(f"{edit.lens} is a lens of width {len(bias)}, and {info.name} has rows of {info.row_shape}")

    def act(rows: Tensor, _at: Chosen) -> Tensor:
        wide = rows if rows.dtype == torch.float64 else rows.float()
        return (wide + wide @ weight.to(wide).T + bias.to(wide)).to(rows.dtype)

    return act


def _from_overlay(edit: FromOverlay, info: SiteInfo, around: Surroundings) -> Action:
    overlay = Overlay(edit.overlay, around.stored.archive)
    _ = overlay[info.name]

    def act(rows: Tensor, at: Chosen) -> Tensor:
        values, there = overlay.read(info.name, at.row)
        new = _as(rows, torch.from_numpy(values))
        is_there = torch.from_numpy(there).to(rows.device).view(-1, *[1] * (rows.ndim - 1))
        return torch.where(is_there, new, rows)

    return act


def _function(edit: Function, info: SiteInfo, _around: Surroundings) -> Action:
    def act(rows: Tensor, _at: Chosen) -> Tensor:
        new = edit.function(info.name, rows)
        if not isinstance(new, Tensor) or (new.shape, new.dtype) != (rows.shape, rows.dtype):
            found = f"{new.dtype}{list(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
            raise PlanError(f"the function gave {found} for {rows.dtype}{list(rows.shape)} at {info.name}")
        return new

    return act


MAKERS: Mapping[type[Edit], Callable[[Any, SiteInfo, Surroundings], Action]] = {
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


def fitting(values: Any, info: SiteInfo, dtype: torch.dtype, what: str) -> Tensor:
    """Return float64 `values` as a tensor that goes with the site's rows, rounded to `dtype`.

    Raises:
        PlanError: Its shape does not go with the rows, or the type cannot hold its values.
    """
    shape = _row_shape(info)
    if values.shape not in (shape, shape[-1:]):
        raise PlanError(f"{info.name} has rows of shape {shape}, and {what} has shape {tuple(values.shape)}")
    largest = float(np.abs(values).max(initial=0.0))
    if largest > torch.finfo(dtype).max:
        raise PlanError(f"{what} reaches {largest:.3g}, more than {_name(dtype)} can hold at {info.name}")
    return torch.from_numpy(values).to(dtype)


def _row_shape(info: SiteInfo) -> tuple[int, ...]:
    return tuple(size or 0 for size in info.row_shape or ())


def _as(rows: Tensor, stored: Tensor) -> Tensor:
    """Bring stored rows to the type and device of the rows that they replace."""
    return stored.to(device=rows.device, dtype=rows.dtype)


def opened(path: Any) -> Archive:
    """Open an archive that an edit names."""
    try:
        return Archive(path)
    except FileNotFoundError as error:
        raise PlanError(f"there is no archive at {path}") from error


def _require_stored(archive: Archive, site: str) -> None:
    if site not in archive.sites:
        raise PlanError(f"{archive.path} does not store {site}; it stores {', '.join(archive.sites)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
