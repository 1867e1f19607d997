"""What each kind of edit does to rows: one function a kind, in the order of rounding that its docstring states.

Whatever can fail does so in two steps before the model runs: when the action is made, and when it is told its rows.
Values are combined in the model's own type, as a hook by hand would, unless said otherwise; what an edit changes by
nothing keeps its bits.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from residua.capture.edits.action import Action, Change, Chosen, Surroundings, always, fitting, row_shape
from residua.capture.edits.lens_map import lens_map
from residua.capture.edits.stored_kinds import brought, from_overlay, mean_of, swapped
from residua.capture.sites.site import SiteInfo
from residua.store.base.canonical import digest_of
from residua.store.base.errors import PlanError
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
from residua.store.edits.vectors import Vector


def _zero(_edit: Zero, _info: SiteInfo, _around: Surroundings) -> Action:
    return always(torch.zeros_like)


def _scale(edit: Scale, _info: SiteInfo, _around: Surroundings) -> Action:
    return always(lambda rows: rows * edit.by)


def _add(edit: Add, info: SiteInfo, around: Surroundings) -> Action:
    """Round scale * vector, computed in float64, to the model's type, then add it there."""
    with np.errstate(over="ignore"):  # what overflows does not fit
        values = edit.vector.values * edit.scale
    delta = fitting(values, info, around.dtype, "the vector")
    return always(lambda rows: _moved(rows, delta.to(rows)))


def _moved(rows: Tensor, delta: Tensor) -> Tensor:
    """Add where there is something to add: adding 0 would turn -0 into 0."""
    return torch.where(delta == 0, rows, rows + delta)


def _set(edit: Set, info: SiteInfo, around: Surroundings) -> Action:
    if isinstance(edit.to, str):
        return brought(around.stored, info, around.dtype)
    if isinstance(edit.to, Vector):
        value = fitting(edit.to.values, info, around.dtype, "the vector")
    else:
        value = fitting(np.full(row_shape(info)[-1:], edit.to), info, around.dtype, "the number")
    return always(lambda rows: value.to(rows).expand_as(rows).clone())


def _project_out(edit: ProjectOut, info: SiteInfo, _around: Surroundings) -> Action:
    """Subtract, in float32 at least, the part in the span of the directions; round once at the end."""
    shape = row_shape(info)
    given = np.atleast_2d(edit.directions.values)
    if given.ndim != 2 or given.shape[1] != shape[-1]:
        raise PlanError(f"{info.name} has rows of width {shape[-1]}, and the directions have shape {given.shape}")
    _, sizes, span = np.linalg.svd(given, full_matrices=False)
    rank = int((sizes > sizes.max() * max(given.shape) * np.finfo(np.float64).eps).sum()) if sizes.max() else 0
    if not rank:
        raise PlanError("the directions are 0, which is no direction")
    basis = torch.from_numpy(span[:rank])

    def change(rows: Tensor) -> Tensor:
        wide = rows if rows.dtype == torch.float64 else rows.float()
        directions = basis.to(wide)
        return (wide - (wide @ directions.T) @ directions).to(rows.dtype)

    return always(change)


def _noise(edit: Noise, info: SiteInfo, around: Surroundings) -> Action:
    """Draw for each token by itself, so that it does not matter what stands beside it or on which rank it is."""
    key = np.array([edit.seed, int(digest_of(info.name)[:16], 16)], np.uint64)
    fitting(np.full(row_shape(info)[-1:], edit.std), info, around.dtype, "std")

    def act(at: Chosen) -> Change:
        def change(rows: Tensor) -> Tensor:
            drawn = np.empty(rows.shape, np.float64)
            for place, (example, position) in enumerate(zip(at.example.tolist(), at.position.tolist(), strict=True)):
                stream = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, position, example]))
                drawn[place] = stream.standard_normal(rows.shape[1:])
            return _moved(rows, torch.from_numpy(drawn * edit.std).to(rows))

        return change

    return act


def _through(edit: Through, info: SiteInfo, _around: Surroundings) -> Action:
    """Apply the lens's affine map in float32 at least; round once at the end."""
    weight, bias = lens_map(edit.lens, info.site)
    if not bool(torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise PlanError(f"the lens at {edit.lens} holds NaN or infinite numbers at {info.name}")
    if info.row_shape != (len(bias),):
        raise PlanError(f"{edit.lens} is a lens of width {len(bias)}, and {info.name} has rows of {info.row_shape}")

    def change(rows: Tensor) -> Tensor:
        wide = rows if rows.dtype == torch.float64 else rows.float()
        return (wide + wide @ weight.to(wide).T + bias.to(wide)).to(rows.dtype)

    return always(change)


def _function(edit: Function, info: SiteInfo, _around: Surroundings) -> Action:
    def change(rows: Tensor) -> Tensor:
        new = edit.function(info.name, rows)
        if not isinstance(new, Tensor) or (new.shape, new.dtype) != (rows.shape, rows.dtype):
            found = f"{new.dtype}{list(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
            raise PlanError(f"the function gave {found} for {rows.dtype}{list(rows.shape)} at {info.name}")
        return new

    return always(change)


MAKERS: Mapping[type[Edit], Callable[[Any, SiteInfo, Surroundings], Action]] = {
    Zero: _zero,
    Mean: mean_of,
    Add: _add,
    Set: _set,
    Scale: _scale,
    ProjectOut: _project_out,
    Noise: _noise,
    Swap: swapped,
    Through: _through,
    FromOverlay: from_overlay,
    Function: _function,
}
