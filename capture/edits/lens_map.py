"""The affine map of a tuned lens, from the folder that `residua lens train` or the `tuned-lens` package wrote.

``params.pt`` holds, for every depth (the number of blocks below a point of the residual stream), ``{depth}.weight`` and
``{depth}.bias`` of a linear layer whose output is added to its input. It is read with `weights_only`, so nothing in it
is run. ``residua.json``, where it is, lists the depths that were trained; the others are the logit lens.
"""

import json
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from residua.store.base.errors import PlanError
from residua.store.format.site_names import Site

_BLOCKS_BELOW = {"resid_pre": 0, "resid_post": 1}
_MOST_JSON_BYTES = 2**20


def lens_map(folder: Path, site: Site) -> tuple[Tensor, Tensor]:
    """Return the linear layer of a lens at a site: weight, (width, width), and bias, (width), as they are stored.

    Raises:
        PlanError: The folder has no lens for the site, or none that fits together.
    """
    if site.layer is None or site.kind not in _BLOCKS_BELOW:
        raise PlanError(f"a lens maps the residual stream between blocks, resid_pre or resid_post, and not {site}")
    depth = site.layer + _BLOCKS_BELOW[site.kind]
    path = folder / "params.pt"
    if not path.is_file():
        raise PlanError(f"there is no lens at {folder}: name a folder that `residua lens train` wrote")
    if depth not in _trained(folder / "residua.json", depth):
        raise PlanError(f"the lens at {folder} was not trained at {site}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise PlanError(f"{path} cannot be read as the tensors of a lens: {error}") from error
    weight = state.get(f"{depth}.weight") if isinstance(state, dict) else None
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise PlanError(f"{path} has no lens for {site}, which is depth {depth}")
    bias = state.get(f"{depth}.bias", torch.zeros(1).expand(len(weight)))  # a file may claim any length
    if not isinstance(bias, Tensor) or weight.shape != (bias.numel(), bias.numel()) or bias.ndim != 1:
        raise PlanError(f"{path}: the lens of {site} has a weight of shape {tuple(weight.shape)}, and is no affine map")
    return weight, bias


def _trained(path: Path, depth: int) -> list[object]:
    """Depths that were trained; where nobody says so, the one that is asked for."""
    if not path.is_file() or path.stat().st_size > _MOST_JSON_BYTES:
        return [depth]
    try:
        found = json.loads(path.read_bytes())["depths"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PlanError(f"{path} does not say at which depths the lens was trained: {error}") from error
    return found if isinstance(found, list) else []
