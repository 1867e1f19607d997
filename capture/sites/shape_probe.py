"""Shape probing: measure the row shapes and dtypes of sites by running the model on a few tokens.

The model runs twice, on batches that differ in the number of examples and of positions, so that each axis of a site's
tensor shows what it counts.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from residua.capture.runtime.devices import input_device
from residua.capture.runtime.wrappers import evaluating, named_modules
from residua.capture.sites.hooks import attached, values_of
from residua.capture.sites.site import SiteInfo
from residua.store.base.errors import CaptureError

_PROBES = ((2, 3), (5, 7))  # (examples, positions): all numbers and products differ


def measure_sites(model: nn.Module, sites: Mapping[str, SiteInfo]) -> dict[str, SiteInfo]:
    """Run a model on a few tokens, and return its sites with the row shapes and dtypes that were measured.

    Args:
        model: A transformers model that takes ``input_ids``. It runs without gradients, in evaluation mode.
        sites: The sites to measure.

    Returns:
        The same sites with the measured ``row_shape``, ``dtype``, ``per_token`` and ``flat``.

    Raises:
        CaptureError: The model cannot run on a few tokens; a site was not met exactly once; or its leading axes are
            neither (batch, positions) nor (batch x positions) nor (batch).
    """
    device = input_device(model)
    runs = []
    for shape in _PROBES:
        ids = torch.ones(shape, dtype=torch.long, device=device)
        kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        runs.append(_run_once(model, sites, kwargs))
    return {name: _site_from_runs(info, runs[0][name], runs[1][name]) for name, info in sites.items()}


def _run_once(model: nn.Module, sites: Mapping[str, SiteInfo], kwargs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run once; return a meta tensor for each site, with the axes that the module's tensor has."""
    seen: dict[str, list[Tensor]] = {name: [] for name in sites}

    def note(info: SiteInfo, tensor: Tensor) -> None:
        seen[info.name].append(tensor.to("meta"))

    plain = [replace(info, flat=False) for info in sites.values()]
    with attached(named_modules(model), plain, values_of(note)), evaluating(model), torch.no_grad():
        try:
            model(**kwargs)
        except Exception as error:  # the boundary to the user's model, which may raise anything
            raise CaptureError(
                f"{type(model).__name__} was run on a small batch to measure the shapes of "
                f"{', '.join(list(sites)[:3])}, and raised {type(error).__name__}: {error}"
            ) from error
    for name, tensors in seen.items():
        if len(tensors) != 1:
            raise CaptureError(not_once(sites[name], len(tensors)))
    return {name: tensors[0] for name, tensors in seen.items()}


def _site_from_runs(info: SiteInfo, first: Tensor, second: Tensor) -> SiteInfo:
    shapes = (tuple(first.shape), tuple(second.shape))
    flat = all(s[:1] == (b * t,) for s, (b, t) in zip(shapes, _PROBES, strict=True))
    per_token = flat or all(s[:2] == probe for s, probe in zip(shapes, _PROBES, strict=True))
    if not per_token and not all(s[:1] == (b,) for s, (b, _) in zip(shapes, _PROBES, strict=True)):
        raise CaptureError(
            f"Site {info.name!r} has shape {shapes[0]} for {_PROBES[0]} (examples, positions) and "
            f"{shapes[1]} for {_PROBES[1]}: which axes are examples and positions is not clear. Choose a site of "
            "shape (batch, positions, ...)."
        )
    start = 1 if flat or not per_token else 2
    row = tuple(a if a == b else None for a, b in zip(shapes[0][start:], shapes[1][start:], strict=True))
    return replace(info, row_shape=row, dtype=_dtype(first), per_token=per_token, flat=flat)


def not_once(info: SiteInfo, n_times: int) -> str:
    """Return the message for a site that a forward call did not compute exactly once."""
    if info.via == "attention" and n_times == 0:
        return (
            f"Site {info.name!r} was not met: the attention of {info.module} does not use transformers' attention "
            "interface, and models that compute attention themselves have no q, k, v, z or pattern. Use module: "
            f"sites, for example 'module:{info.module}@output' or the projections in it."
        )
    return (
        f"Site {info.name!r} ({info.where}) was met {n_times} times in one forward call instead of once. "
        "Name a module that each forward call runs exactly once, and call the full model."
    )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
