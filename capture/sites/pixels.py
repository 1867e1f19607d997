"""Models that take pixels and not tokens: a few pixels to run them on, and which position is which patch.

Axes: `B` images, `C` channels, `H` and `W` pixels, `T` positions, `D` model width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from residua.capture.hooks.forward_call import trial
from residua.capture.runtime.devices import input_device
from residua.capture.runtime.module_io import input_item
from residua.capture.runtime.wrappers import core_of
from residua.capture.sites.anatomy import PIXELS, anatomy_of
from residua.store.base.errors import CaptureError

_USUAL_SIZE = 224  # of models whose config has none
_MOST_PATCHES = 2**20


@dataclass(frozen=True, kw_only=True)
class PatchGrid:
    """The positions of an image in the residual stream: patches row by row, with special positions around them.

    Attributes:
        first: Position of the first patch; before it are a CLS token, a distillation token, registers.
        n_rows: Rows of patches.
        n_columns: Patches in a row.
        n_positions: Positions of the image; after the patches are detection tokens, for example.
    """

    first: int
    n_rows: int
    n_columns: int
    n_positions: int


def few_pixels(model: nn.Module, n_images: int) -> Tensor:
    """Return images that differ from place to place, of the size in the model's config, (B, C, H, W).

    The type is that of the model's weights, the device that of its inputs. No random numbers are used up.
    """
    core: Any = core_of(model)
    size = _pair(getattr(core.config, "image_size", None) or _USUAL_SIZE)
    return _pixels(core, (n_images, int(getattr(core.config, "num_channels", 3)), *size))


def _pixels(core: Any, shape: tuple[int, ...]) -> Tensor:
    steps = torch.arange(prod(shape)) * 37 % 101
    return (steps / 50 - 1).view(shape).to(input_device(core), core.dtype)


def pixel_arguments(model: nn.Module, pixels_BCHW: Tensor) -> dict[str, Any]:
    """Return the arguments of a forward call for images of one size.

    A model whose position embeddings are for another size interpolates them, if it can.
    """
    core: Any = core_of(model)
    arguments: dict[str, Any] = {PIXELS: pixels_BCHW}
    size = getattr(core.config, "image_size", None)
    if size is not None and tuple(pixels_BCHW.shape[-2:]) != _pair(size):
        takes = signature(core.forward).parameters
        if "interpolate_pos_encoding" in takes or any(each.kind is each.VAR_KEYWORD for each in takes.values()):
            arguments["interpolate_pos_encoding"] = True
    return arguments


def run_on_pixels(model: nn.Module, pixels_BCHW: Tensor) -> Tensor | None:
    """Run a model on images, without gradients and in evaluation mode.

    Returns:
        Its logits or last hidden state; None if it gives neither.

    Raises:
        CaptureError: The model cannot run on these pixels alone.
    """
    with trial(model):
        try:
            output = model(**pixel_arguments(model, pixels_BCHW))
        except Exception as error:  # the boundary to the user's model, which may raise anything
            raise CaptureError(
                f"{type(core_of(model)).__name__} was run on {len(pixels_BCHW)} images of {_size_text(pixels_BCHW)} "
                f"pixels to measure its sites, and raised {type(error).__name__}: {error}"
            ) from error
    found = getattr(output, "logits", getattr(output, "last_hidden_state", None))
    return found if isinstance(found, Tensor) else None


def patch_grid(model: nn.Module, pixel_shape: tuple[int, ...]) -> PatchGrid:
    """Return which positions are patches, and where these lie in an image, as a run of the model shows.

    What enters the first block is compared between images that differ in one patch: the first, its neighbours to the
    right and below, and the last. Each has to change its own position and no other.

    Args:
        model: A model of transformers that takes pixels.
        pixel_shape: (channels, height, width) of the images.

    Raises:
        CaptureError: The model has no blocks, or no position for each patch.
    """
    core = core_of(model)
    known = _known_grids.setdefault(core, {})
    if pixel_shape not in known:
        known[pixel_shape] = _found_grid(model, pixel_shape)
    found = known[pixel_shape]
    if isinstance(found, str):
        raise CaptureError(found)
    return found


_known_grids: "WeakKeyDictionary[nn.Module, dict[tuple[int, ...], PatchGrid | str]]" = WeakKeyDictionary()
"""What was found out about each model, by the shape of images."""


def _found_grid(model: nn.Module, pixel_shape: tuple[int, ...]) -> PatchGrid | str:
    """Return the grid, or a sentence that says why there is none."""
    name = type(core_of(model)).__name__
    if len(pixel_shape) != 3:
        return f"{name} takes images of shape {pixel_shape}, and not of (channels, height, width): it has no patches"
    size = getattr(getattr(core_of(model), "config", None), "patch_size", None)
    if size is None:
        return f"the config of {name} has no patch_size, so which position is which patch is not known"
    patch = _pair(size)
    grid = (pixel_shape[1] // patch[0], pixel_shape[2] // patch[1])
    if min(grid) < 1 or grid[0] * grid[1] > _MOST_PATCHES:
        return f"{name} has patches of {patch[0]} x {patch[1]} pixels, and images of {pixel_shape[1:]} do not hold them"
    places = dict.fromkeys([(0, 0), (0, grid[1] - 1), (grid[0] - 1, 0), (grid[0] - 1, grid[1] - 1)])
    plain_BCHW = _pixels(core_of(model), (1, *pixel_shape)).repeat(len(places) + 1, 1, 1, 1)
    for image_CHW, (row, column) in zip(plain_BCHW[1:], places, strict=True):
        image_CHW[:, row * patch[0] : (row + 1) * patch[0], column * patch[1] : (column + 1) * patch[1]] += 1
    try:
        entered_BTD = _entering(model, plain_BCHW)
    except CaptureError as error:
        return str(error)
    changed_BT = (entered_BTD[1:] != entered_BTD[0]).flatten(2).any(-1)
    found = [torch.nonzero(image_T).flatten().tolist() for image_T in changed_BT]
    first = found[0][0] if found[0] else 0
    if found != [[first + row * grid[1] + column] for row, column in places]:
        return (
            f"{name} does not give each of its {grid[0]} x {grid[1]} patches a position of its own, row by row: its "
            f"first block takes {entered_BTD.shape[1]} positions, and rows have no place in the image"
        )
    return PatchGrid(first=first, n_rows=grid[0], n_columns=grid[1], n_positions=entered_BTD.shape[1])


class _EnteredError(Exception):
    """The first block was reached, and nothing after it is needed."""


def _entering(model: nn.Module, pixels_BCHW: Tensor) -> Tensor:
    """Return what enters the first block of a model, (B, T, D)."""
    core = core_of(model)
    anatomy = anatomy_of(core)
    if anatomy is None:
        raise CaptureError(f"{type(core).__name__} has no list of blocks that a residual stream passes through")
    block = anatomy.blocks[0]
    seen: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        seen.append(input_item(args, dict(kwargs), None, block).detach().clone())
        raise _EnteredError

    handle = anatomy.modules[block].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run_on_pixels(model, pixels_BCHW)
    except CaptureError as error:
        if not isinstance(error.__cause__, _EnteredError):
            raise
    finally:
        handle.remove()
    if not seen or seen[0].ndim != 3 or len(seen[0]) != len(pixels_BCHW):
        raise CaptureError(f"{block} of {type(core).__name__} takes no tensor of (images, positions, width)")
    return seen[0]


def _pair(size: Any) -> tuple[int, int]:
    """Return a size of a config, one number or two, as (height, width)."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping):
        return int(size["height"]), int(size["width"])
    height, width = size
    return int(height), int(width)


def _size_text(pixels: Tensor) -> str:
    return " x ".join(map(str, pixels.shape[-2:]))
