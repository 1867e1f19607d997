"""The shapes of sites that only a run can tell: the model is run and looked at.

A model over token ids is run twice, on batches of different height and length, so that each axis shows what
it counts.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from residua.capture.runtime.devices import input_device
from residua.capture.runtime.wrappers import named_modules
from residua.capture.sites.hooks import attached, values_of
from residua.capture.sites.site import SiteInfo
from residua.store.base.errors import CaptureError

_PROBES = ((2, 3), (5, 7))  # (batch, positions): products and members all differ


def measured(model: nn.Module, sites: Mapping[str, SiteInfo]) -> dict[str, SiteInfo]:
    """Fill in what running a model over token ids tells: row shape, type, and which axes count what.

    Args:
        model: A transformers model that takes ``input_ids``. It is run without gradients, in evaluation mode.
        sites: Sites to look at.

    Returns:
        The same sites with ``row_shape``, ``dtype``, ``per_token`` and ``flat`` as they were seen.

    Raises:
        CaptureError: The model cannot be run on a few tokens, or a site was not met exactly once, or its
            leading axes are neither (batch, positions) nor (batch x positions) nor (batch).
    """
    device = input_device(model)
    runs = []
    for shape in _PROBES:
        ids = torch.ones(shape, dtype=torch.long, device=device)
        kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        runs.append(_seen(model, sites, kwargs))
    return {name: _understood(info, runs[0][name], runs[1][name]) for name, info in sites.items()}


def _seen(model: nn.Module, sites: Mapping[str, SiteInfo], kwargs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run once; return a tensor on meta for each site, in the layout in which the module has it."""
    seen: dict[str, list[Tensor]] = {name: [] for name in sites}

    def note(info: SiteInfo, tensor: Tensor) -> None:
        seen[info.name].append(tensor.to("meta"))

    plain = [replace(info, flat=False) for info in sites.values()]
    with attached(named_modules(model), plain, values_of(note)), evaluating(model), torch.no_grad():
        try:
            model(**kwargs)
        except Exception as error:  # the boundary to the user's model: whatever it raises, we could not look
            raise CaptureError(
                f"{type(model).__name__} was run on a small batch to see the shapes of "
                f"{', '.join(list(sites)[:3])}, and raised {type(error).__name__}: {error}"
            ) from error
    for name, tensors in seen.items():
        if len(tensors) != 1:
            raise CaptureError(not_once(sites[name], len(tensors)))
    return {name: tensors[0] for name, tensors in seen.items()}


def _understood(info: SiteInfo, first: Tensor, second: Tensor) -> SiteInfo:
    shapes = (tuple(first.shape), tuple(second.shape))
    flat = all(s[:1] == (b * t,) for s, (b, t) in zip(shapes, _PROBES, strict=True))
    per_token = flat or all(s[:2] == probe for s, probe in zip(shapes, _PROBES, strict=True))
    if not per_token and not all(s[:1] == (b,) for s, (b, _) in zip(shapes, _PROBES, strict=True)):
        raise CaptureError(
            f"Site {info.name!r} has shape {shapes[0]} for {_PROBES[0]} (examples, positions) and "
            f"{shapes[1]} for {_PROBES[1]}: its rows cannot be told apart. Choose a site of shape "
            "(batch, positions, ...)."
        )
    start = 1 if flat or not per_token else 2
    row = tuple(a if a == b else None for a, b in zip(shapes[0][start:], shapes[1][start:], strict=True))
    return replace(info, row_shape=row, dtype=_dtype(first), per_token=per_token, flat=flat)


def not_once(info: SiteInfo, n_times: int) -> str:
    """Say that a site was met no time or several times in one forward call."""
    if info.via == "attention" and n_times == 0:
        return (
            f"Site {info.name!r} was not met: the attention of {info.module} did not come through "
            "transformers' attention interface. Models that compute attention by themselves give no q, k, v, "
            f"z or pattern; use module: sites, for example 'module:{info.module}@output' or the projections "
            "below it."
        )
    return (
        f"Site {info.name!r} ({info.where}) was met {n_times} times in one forward call instead of once. "
        "Each forward call has to run it exactly once; name a module that it does run once, or call "
        "the model itself and not a part of it."
    )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, so that a look uses no random numbers and updates nothing."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
