"""The compressed latent of keys and values, in multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

One linear map makes the values of all heads, and the part of the keys that is not rotated, of a narrow vector for each
token. That vector is found from behind: the values that attention takes are, bit for bit, a part of the result of a
linear map whose input is not as wide as the residual stream.
"""

from functools import partial

import torch
from torch import Tensor

from residua.capture.blocks.block_run import BlockRun, TorchCall
from residua.capture.blocks.experts import Spot
from residua.capture.blocks.sums import factors_of, nearest

_ROW_AXES = 3  # (examples, positions, width)


def latent_in(run: BlockRun) -> Spot | str:
    """Return where a block has the latent of its keys and values, as the linear map takes it; or why it has none."""
    if len(run.values) != 1:
        return f"{run.path} calls transformers' attention interface {len(run.values)} times instead of once"
    width = run.entered.shape[-1]
    for linear in reversed(run.calls["linear"]):
        if linear.taken.shape[-1] != width and _makes_values(linear, run.values[0]):
            return _where(run, linear)
    return f"{run.path} makes its keys and values of what it takes, and of no narrower vector"


def _makes_values(linear: TorchCall, values_BHTD: Tensor) -> bool:
    n_examples, n_heads, n_positions, width = values_BHTD.shape
    rest = linear.values.numel() - values_BHTD.numel()
    if rest <= 0 or linear.values.numel() % (n_examples * n_positions * n_heads):
        return False
    by_head_BTHD = linear.values.reshape(n_examples, n_positions, n_heads, -1)
    return torch.equal(by_head_BTHD[..., -width:].transpose(1, 2), values_BHTD)


def _where(run: BlockRun, linear: TorchCall) -> Spot | str:
    """Return the last module whose output, times a factor, is what the linear map takes."""
    n_examples, n_positions = run.entered.shape[:2]
    taken = linear.taken.reshape(n_examples, n_positions, -1)
    for path, given in reversed(run.given.items()):
        if given.ndim != _ROW_AXES or given.shape != taken.shape:
            continue
        factors = (1.0,) if torch.equal(given, taken) else factors_of(taken, given, [], scaled=True)
        if factors is not None:
            factor = nearest(iter(()), factors[0], taken.dtype, partial(_is_multiple, given, taken))
            return Spot(path=path, via="output", index=None, shape=tuple(given.shape), dtype=given.dtype, factor=factor)
    return f"no module of {run.path} gives the vector that {linear.path} makes keys and values of, for each token"


def _is_multiple(given: Tensor, taken: Tensor, factor: float) -> bool:
    return torch.equal(given * factor, taken)
