"""Models that take images and not tokens: a few images to run them on, and which position is which patch.

Most take whole images. Some take patches that their processor cut before: the patches of all images as one sequence
with the grid of each (Qwen-VL), or those of each image filled up to one length (SigLIP2, Gemma 4). A model that makes
one sequence of all images of a call runs on one image at a time, so that a position is a patch of a known image.

Axes: `B` images, `C` channels, `H` and `W` pixels, `T` positions, `D` model width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from math import prod
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from residua.capture.hooks.forward_call import run_on_few
from residua.capture.runtime.devices import input_device
from residua.capture.runtime.module_io import input_item
from residua.capture.runtime.wrappers import core_of
from residua.capture.sites.anatomy import GRID, PIXELS, anatomy_of, takes_pixels
from residua.store.base.errors import CaptureError

Key = TypeVar("Key")
Found = TypeVar("Found")

_USUAL_SIZE = 224  # of models whose config has none
_MOST_PATCHES = 2**20
_MORE_PATCHES = 2  # of the larger of two images, side by side
_IMAGE_AXES, _A_ROW_EACH = 3, 2
_SHAPES = "spatial_shapes"
"""Name of the argument that tells rows and columns of each image, where patches of each fill up to one length."""
_MASK = "pixel_attention_mask"
_SIZES = ("target_sizes",)
"""Names of arguments with a default under which a model does not run."""
_PLACES = "pixel_position_ids"
"""Name of the argument that tells column and row of each patch, where patches of each image fill up to one length."""


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


def is_cut(model: nn.Module) -> bool:
    """Return whether a model takes images as patches that its processor cut before."""
    takes = signature(core_of(model).forward).parameters
    return takes_pixels(model) and any(name in takes for name in (GRID, _SHAPES, _PLACES))


def runs_alone(model: nn.Module) -> bool:
    """Return whether a model makes one sequence of all images of a call, so that each image is run by itself.

    A model over whole images runs once, up to its first block, on two of them.
    """
    core = core_of(model)
    if is_cut(core) or not takes_pixels(core):
        return takes_pixels(core) and GRID in signature(core.forward).parameters
    if core not in _known_alone:
        try:
            _known_alone[core] = len(_entered(core, few_images(core, 2))) == 1
        except CaptureError:
            _known_alone[core] = False
    return _known_alone[core]


_known_alone: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def few_images(model: nn.Module, n_images: int, *, larger: bool = False) -> dict[str, Tensor]:
    """Return images that differ from place to place, of the size in the model's config, as examples have them.

    No random numbers are used up.

    Args:
        model: A model that takes images.
        n_images: Number of images.
        larger: Make them larger than otherwise, where images may be of any size: more patches than a window has.

    Returns:
        Pixels of the type of the model's weights, (B, C, H, W), on the device of its inputs; or patches, (B, patches,
        numbers of a patch) or with the axes of a patch, with the rows and columns of each image.
    """
    core: Any = core_of(model)
    if not is_cut(core):
        size = _pair(getattr(core.config, "image_size", None) or _USUAL_SIZE)
        if larger:
            size = (size[0], size[1] + _MORE_PATCHES * _pair(core.config.patch_size)[1])
        return {PIXELS: _pixels(core, (n_images, int(getattr(core.config, "num_channels", 3)), *size))}
    side = _few_rows(core.config)
    columns = max(side + side // 2, _rows_of_two_windows(core.config)) if larger else side
    patches = _pixels(core, (n_images, side * columns, *_patch_shape(core)))
    takes = signature(core.forward).parameters
    if _PLACES in takes:
        places = [[column, row] for row in range(side) for column in range(columns)]
        return {PIXELS: patches, _PLACES: torch.tensor([places] * n_images, device=patches.device)}
    if GRID not in takes:
        return {PIXELS: patches, _SHAPES: torch.tensor([[side, columns]] * n_images, device=patches.device)}
    ones = {name: torch.ones(n_images, dtype=torch.int64, device=patches.device) for name in _ones(core)}
    return {PIXELS: patches, GRID: torch.tensor([[1, side, columns]] * n_images, device=patches.device), **ones}


def _pixels(core: Any, shape: tuple[int, ...]) -> Tensor:
    steps = torch.arange(prod(shape)) * 37 % 101
    return (steps / 50 - 1).view(shape).to(input_device(core), core.dtype)


def _few_rows(config: Any) -> int:
    """Return a small number of rows of patches that a tower can merge."""
    merged = (
        getattr(config, name, None) for name in ("spatial_merge_size", "merge_kernel_size", "pooling_kernel_size")
    )
    return 2 * max(2, *_pair(next((size for size in merged if size), 1)))


def _rows_of_two_windows(config: Any) -> int:
    """Return how many patches lie side by side in two windows of attention; 0 without windows."""
    window = getattr(config, "window_size", None) or 0
    n_patches = int(window) // _pair(getattr(config, "patch_size", None) or 1)[1]
    side = _few_rows(config)
    return -(-2 * n_patches // side) * side


def _patch_shape(core: nn.Module) -> tuple[int, ...]:
    """Return the shape of a patch as the first linear map or convolution of a model takes it."""
    for module in core.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim > 1 and not isinstance(module, nn.Embedding):
            return tuple(weight.shape[1:])
    raise CaptureError(f"{type(core).__name__} has no layer that takes patches")


def _ones(core: nn.Module) -> list[str]:
    """Return the arguments of a forward that are 1 for each image: how many patches are merged to one side."""
    return [name for name in ("merge_sizes",) if name in signature(core.forward).parameters]


def views_of(model: nn.Module, made: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return what a model takes of each view of one image, from what its processor makes of the image.

    Returns:
        A view as `few_images` has one image, in the order of the processor; most make one view.

    Raises:
        CaptureError: The processor makes a film of the image, or not what the model takes.
    """
    if not is_cut(model):
        pixels = made[PIXELS]
        pixels = pixels.flatten(0, 1) if pixels.ndim > _IMAGE_AXES + 1 else pixels  # (images, views, ...)
        return [{PIXELS: view[None]} for view in pixels]
    takes = signature(core_of(model).forward).parameters
    wanted = [each for each in (GRID, _SHAPES, _PLACES, *_ones(core_of(model))) if each in takes]
    keys = {each: (each, f"image_{each}", each.replace("pixel_", "image_")) for each in wanted}
    found = {each: made[key] for each in wanted for key in keys[each] if key in made}
    if len(found) < len(wanted):
        name = type(core_of(model)).__name__
        raise CaptureError(f"{name} takes {', '.join(wanted)}, and its processor gives {', '.join(made)}")
    n_views = len(next(iter(found.values())))
    views = [{key: tensor[view : view + 1] for key, tensor in found.items()} for view in range(n_views)]
    patches = made[PIXELS]
    if GRID in found:
        sizes = [prod(view[GRID][0].tolist()) for view in views]
        if len(patches) != sum(sizes):
            raise CaptureError(f"the processor makes {len(patches)} patches of the image, and grids of {sum(sizes)}")
        return [_cut_view(model, part, view) for part, view in zip(torch.split(patches, sizes), views, strict=True)]
    return [_cut_view(model, part, view) for part, view in zip(patches, views, strict=True)]


def _cut_view(model: nn.Module, patches: Tensor, view: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return one view with its patches, without those that fill up."""
    if _PLACES in view:
        is_patch = (view[_PLACES] >= 0).all(-1)[0]
        view, patches = {_PLACES: view[_PLACES][:, is_patch]}, patches[is_patch]
    grid = view[GRID][0].tolist() if GRID in view else list(grid_of(view))
    patches = patches if GRID in view else patches[: prod(grid)]
    if len(patches) != prod(grid) or (GRID in view and grid[0] != 1):
        raise CaptureError(
            f"the processor makes {len(patches)} patches of the image for {type(core_of(model)).__name__}, in a grid "
            f"of {grid}"
        )
    return {PIXELS: patches[None], **view}


def grid_of(inputs: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return rows and columns of the patches of an image that was cut before."""
    if _PLACES in inputs:
        columns, rows = (int(number) + 1 for number in inputs[_PLACES][0].amax(0))
        return rows, columns
    rows, columns = inputs[GRID if GRID in inputs else _SHAPES][0].tolist()[-2:]
    return rows, columns


def image_arguments(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of a forward call for images that `few_images` or `views_of` gave, of one size.

    A model whose position embeddings are for another size interpolates them, if it can.
    """
    core: Any = core_of(model)
    takes, pixels = signature(core.forward).parameters, inputs[PIXELS]
    if GRID in inputs:
        name = PIXELS if PIXELS in takes else next(iter(takes))
        others = {key: tensor for key, tensor in inputs.items() if key != PIXELS}
        return {name: _PACKED[_known_packed.get(core, 0)](pixels.flatten(0, 1)), **others}
    if _PLACES in inputs:
        return dict(inputs)
    if _SHAPES in inputs:
        return {**inputs, _MASK: torch.ones(pixels.shape[:2], dtype=torch.int64, device=pixels.device)}
    arguments: dict[str, Any] = {PIXELS: pixels}
    size = getattr(core.config, "image_size", None)
    can_interpolate = "interpolate_pos_encoding" in takes or any(e.kind is e.VAR_KEYWORD for e in takes.values())
    if size is not None and tuple(pixels.shape[-2:]) != _pair(size) and can_interpolate:
        arguments["interpolate_pos_encoding"] = True
    return arguments


def run_on_images(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Run a model on images that `few_images` gave, without gradients and in evaluation mode.

    Returns:
        Its logits or last hidden state; None if it gives neither.

    Raises:
        CaptureError: The model cannot run on these images alone.
    """
    arguments = image_arguments(model, inputs)
    if others := _others_needed(model, arguments):
        raise CaptureError(
            f"{type(core_of(model)).__name__} takes {' and '.join(others)} beside images, which is not understood here"
        )
    return run_on_few(model, arguments, _text(inputs))


def _others_needed(model: nn.Module, given: Mapping[str, Any]) -> list[str]:
    """Return the arguments beside images that a model cannot be called without."""
    takes = signature(core_of(model).forward).parameters.values()
    needed = [each.name for each in takes if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
    return [name for name in [*needed, *_SIZES] if name not in given and name in [each.name for each in takes]]


def image_probes(model: nn.Module) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (images, positions) of two runs on a few images: of other numbers of them, or of other sizes of one.

    Raises:
        CaptureError: The model has not one position for each patch.
    """
    if runs_alone(model):
        small, large = (n_positions(model, few_images(model, 1, larger=larger)) for larger in (False, True))
        return (1, small), (1, large)
    n = n_positions(model, few_images(model, 1))
    return (2, n), (3, n)


def n_positions(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Return how many positions a model makes of an image; raises CaptureError as `patch_grid` does."""
    if is_cut(model):
        return len(patch_order(model, inputs))
    return patch_grid(model, tuple(inputs[PIXELS].shape[1:])).n_positions


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
    known = _known_grids.setdefault(core_of(model), {})
    return _found_once(known, pixel_shape, lambda: _found_grid(model, pixel_shape))


def _found_once(known: dict[Key, Found | str], key: Key, find: Callable[[], Found | str]) -> Found:
    """Return what is known, or is found now; raise CaptureError if that is a sentence on why there is none."""
    if key not in known:
        known[key] = find()
    found = known[key]
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
        entered_BTD = _entering(model, {PIXELS: plain_BCHW})
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


def patch_order(model: nn.Module, inputs: Mapping[str, Tensor]) -> npt.NDArray[np.int64]:
    """Return which patch is at each position, of one image that was cut before, as runs of the model show.

    What enters the first block is compared between images in which some patches have other values: those whose number
    has a digit of 1, and those where it is 0, for each of its binary digits. So a position changes as the digits of
    the one patch that it is; one that several patches change is none of them.

    Args:
        model: A model that takes patches.
        inputs: One image, as `views_of` has it.

    Returns:
        The number of the patch at each position, in the order of the processor; -1 for a position beside patches.

    Raises:
        CaptureError: The model has no blocks, or no position for each patch.
    """
    known = _known_orders.setdefault(core_of(model), {})
    return _found_once(known, grid_of(inputs), lambda: _found_order(model, inputs))


def moves_patches(model: nn.Module) -> bool:
    """Return whether a model that takes patches puts them into another order before its first block."""
    if not is_cut(model):
        return False
    order = patch_order(model, few_images(model, 1, larger=True))
    return bool((np.diff(order[order >= 0]) < 0).any())


_known_orders: "WeakKeyDictionary[nn.Module, dict[tuple[int, int], npt.NDArray[np.int64] | str]]" = WeakKeyDictionary()
"""What was found out about each model that takes patches, by rows and columns of an image."""


def _found_order(model: nn.Module, inputs: Mapping[str, Tensor]) -> npt.NDArray[np.int64] | str:
    """Return the order, or a sentence that says why there is none."""
    name, n_patches = type(core_of(model)).__name__, prod(grid_of(inputs))
    if n_patches > _MOST_PATCHES:
        return f"an image has {n_patches:,} patches, and {name} is asked for up to {_MOST_PATCHES:,}"
    pixels = inputs[PIXELS].to(input_device(model), getattr(core_of(model), "dtype", None))
    placed = {key: tensor.to(pixels.device) for key, tensor in inputs.items()}
    other = (pixels + 1 + torch.arange(pixels[0, 0].numel(), device=pixels.device).view(pixels[0, 0].shape) % 3).to(
        pixels.dtype
    )
    numbers = torch.arange(n_patches, device=pixels.device)
    try:
        plain_1TD = _entering(model, {**placed, PIXELS: pixels})
        with_1, with_0 = (torch.zeros(plain_1TD.shape[1], dtype=torch.int64, device=plain_1TD.device) for _ in range(2))
        for digit in range(max(1, (n_patches - 1).bit_length())):
            for value, changed in ((1, with_1), (0, with_0)):
                chosen = ((numbers >> digit) & 1 == value).view(1, -1, *[1] * (pixels.ndim - 2))
                entered_1TD = _entering(model, {**placed, PIXELS: torch.where(chosen, other, pixels)})
                changed |= (entered_1TD != plain_1TD).any(-1)[0].long() << digit
    except CaptureError as error:
        return str(error)
    ones, zeros = with_1.cpu().numpy(), with_0.cpu().numpy()
    is_patch = (ones | zeros) != 0
    every = (1 << max(1, (n_patches - 1).bit_length())) - 1
    if (ones[is_patch] ^ zeros[is_patch] != every).any() or sorted(ones[is_patch]) != list(range(n_patches)):
        rows, columns = grid_of(inputs)
        return (
            f"{name} does not give each of its {rows} x {columns} patches a position of its own: its first block takes "
            f"{len(ones)} positions, and rows have no place in the image"
        )
    order: npt.NDArray[np.int64] = np.where(is_patch, ones, -1)
    return order


class _EnteredError(Exception):
    """The first block was reached, and nothing after it is needed."""


def _entering(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return what enters the first block of a model, (B, T, D)."""
    if runs_alone(model):
        each = [
            {key: tensor[place : place + 1] for key, tensor in inputs.items()} for place in range(_n_images(inputs))
        ]
        entered = [_entered(model, one) for one in each]
        found = torch.cat([tensor if tensor.ndim > _A_ROW_EACH else tensor[None] for tensor in entered])
    else:
        found = _entered(model, inputs)
    if found.ndim != _A_ROW_EACH + 1 or len(found) != _n_images(inputs):
        raise CaptureError(
            f"the first block of {type(core_of(model)).__name__} takes {tuple(found.shape)}, and not (images, "
            "positions, width)"
        )
    return found


def _n_images(inputs: Mapping[str, Tensor]) -> int:
    return len(inputs[PIXELS])


def _entered(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return what enters the first block of a model in one run, with the axes that it has."""
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
        problem = _run_to(core, inputs)
        if problem is not None and GRID in inputs and core not in _known_packed:
            for number in range(1, len(_PACKED)):
                _known_packed[core] = number
                if _run_to(core, inputs) is None:
                    problem = None
                    break
                del _known_packed[core]
    finally:
        handle.remove()
    if problem is not None:
        raise problem
    if not seen:
        raise CaptureError(f"{block} of {type(core).__name__} does not run")
    return seen[-1]


_PACKED: Sequence[Callable[[Tensor], Tensor]] = (
    lambda patches: patches,
    lambda patches: patches[None],
    lambda patches: patches.flatten(1),
)
"""Ways to give a model the patches of a call: with the axes of a patch, one sequence of them, or each as one axis."""

_known_packed: "WeakKeyDictionary[nn.Module, int]" = WeakKeyDictionary()
"""Which of these ways a model takes other than the first, as a run has shown."""


def _run_to(core: nn.Module, inputs: Mapping[str, Tensor]) -> CaptureError | None:
    """Run a model on images until its first block stops it; return what kept it from coming there."""
    try:
        run_on_images(core, inputs)
    except CaptureError as error:
        return None if isinstance(error.__cause__, _EnteredError) else error
    return None


def _pair(size: Any) -> tuple[int, int]:
    """Return a size of a config, one number or two, as (height, width)."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping):
        return int(size["height"]), int(size["width"])
    height, width = size
    return int(height), int(width)


def _text(inputs: Mapping[str, Tensor]) -> str:
    """Return what images are, in words: 2 images of 32 x 32 pixels."""
    n_images, shape = _n_images(inputs), inputs[PIXELS].shape
    if any(name in inputs for name in (GRID, _SHAPES, _PLACES)):
        return f"{n_images} images of {' x '.join(map(str, grid_of(inputs)))} patches"
    return f"{n_images} images of {' x '.join(map(str, shape[-2:]))} pixels"
