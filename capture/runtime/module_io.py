"""One tensor of a module's input or output: how to take it out, and how to replace it.

A module's output is a tensor, a tuple, a list or a mapping (as transformers' outputs); its input is positional and
keyword arguments. Items are numbered from 0 in their order; keyword arguments follow the positional ones.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from residua.capture.runtime.collectives import on_rank
from residua.store.base.errors import CaptureError


def output_item(output: object, index: int | None, where: str) -> Tensor:
    """Return one tensor of a module's output.

    Args:
        output: The module's output.
        index: Which item of a tuple, list or mapping; None means the tensor itself or the first item.
        where: Site and module, for the message.

    Raises:
        CaptureError: There is no such item, or it is not a tensor.
    """
    if isinstance(output, Tensor) and index is None:
        return output
    return _tensor(_items(output), index, where)


def replaced_output(output: Any, index: int | None, value: Tensor) -> Any:
    """Return a module's output with one tensor replaced, in the same kind of container."""
    if isinstance(output, Tensor):
        return value
    position = index or 0
    if isinstance(output, MutableMapping):
        output[list(output)[position]] = value
        return output
    items = [value if i == position else item for i, item in enumerate(output)]
    make = getattr(type(output), "_make", type(output))  # named tuples take their items as arguments
    return make(items)


def input_item(args: tuple[Any, ...], kwargs: dict[str, Any], index: int | None, where: str) -> Tensor:
    """Return one tensor of a module's arguments; see `output_item`."""
    return _tensor([*args, *kwargs.values()], index, where)


def replaced_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], index: int | None, value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a module's arguments with one tensor replaced."""
    position = index or 0
    if position < len(args):
        return (*args[:position], value, *args[position + 1 :]), kwargs
    name = list(kwargs)[position - len(args)]
    return args, {**kwargs, name: value}


def checked_replacement(old: Tensor, new: object, name: str) -> Tensor:
    """Return a callback's replacement for a site's tensor, after checking that it fits.

    Raises:
        CaptureError: It is not a tensor, or its shape, dtype or device is not the site's.
    """
    if not isinstance(new, torch.Tensor):
        raise CaptureError(
            f"Site {name!r}{on_rank()}: the callback returned {type(new).__name__}; return a tensor, or None to leave "
            "the model alone."
        )
    if (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
        raise CaptureError(
            f"Site {name!r}{on_rank()} holds {_describe(old)}, and the callback returned {_describe(new)} to replace "
            "it; return a tensor of the same shape and dtype on the same device."
        )
    return new


def _items(output: object) -> list[object]:
    if isinstance(output, Mapping):
        return list(output.values())
    if isinstance(output, tuple | list):
        return list(output)
    return [output]


def _tensor(items: list[object], index: int | None, where: str) -> Tensor:
    position = index or 0
    item = items[position] if position < len(items) else None
    if isinstance(item, Tensor):
        return item
    found = ", ".join(_describe(i) if isinstance(i, Tensor) else type(i).__name__ for i in items)
    raise CaptureError(
        f"{where}: item {position} is not a tensor there; found: {found or 'nothing'}. "
        "Add .N to the site's name to choose item N, counted from 0."
    )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"
