"""The LM head of a model that is not in the table of architectures, found by what runs after its last block.

A run over a few tokens shows the final residual stream, the modules that follow on it value by value, and the logits.
A way from one to the other has the parts that the files of an LM head can hold (`residua.store.format.sidecars`): a
norm, a projection, a dense layer with activation and norm, the unembedding, a scale, a soft cap. It is taken if it
gives the model's logits.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn
from transformers.activations import ACT2FN

from residua.capture.hooks.forward_call import trial
from residua.capture.identity.few_tokens import logits_of, run_few_tokens
from residua.capture.runtime.module_io import input_item, output_item
from residua.capture.sites.anatomy import Anatomy
from residua.store.base.errors import CaptureError
from residua.store.format.sidecars import Activation, LMHeadSpec, Norm

_USUAL_EPS = (1e-5, 1e-6, 1e-12, 1e-8)
_LARGEST_EPS = 1e-2
_KINDS: tuple[tuple[Norm, float], ...] = (("layer", 0.0), ("rms", 0.0), ("rms", 1.0))  # and what is added to the weight
# The largest error, as a part of the largest value, of one step that is computed again.
_SAME = {torch.float64: 1e-9, torch.float32: 2e-5}
_SAME_LOW_PRECISION = 0.03
# Likewise of a factor, of which all logits together are a measurement.
_SAME_FACTOR = {torch.float64: 1e-12, torch.float32: 2e-6}
_SAME_FACTOR_LOW_PRECISION = 2e-3


@dataclass(frozen=True, kw_only=True)
class FoundHead:
    """How the final residual stream becomes logits.

    Attributes:
        spec: Kinds of its parts, and numbers.
        paths: The modules whose parameters are stored: from their name in the files to their path in the model.
        seen: The final residual stream and the logits of the run that showed it, by the names of their sites.
    """

    spec: LMHeadSpec
    paths: Mapping[str, str]
    seen: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One call of one module after the last block."""

    path: str
    module: nn.Module
    taken: Tensor
    given: Tensor


@dataclass(frozen=True, kw_only=True)
class _Way:
    """A way from the final residual stream to what the unembedding may take."""

    spec: LMHeadSpec
    paths: Mapping[str, str]
    hidden: Tensor


def find_head(model: nn.Module, anatomy: Anatomy) -> FoundHead | str:
    """Find the LM head of a model that is whole in this process, by one run over a few tokens.

    Args:
        model: The model, with its wrappers.
        anatomy: Its blocks and its unembedding.

    Returns:
        The head, or why it is not known.
    """
    name = type(anatomy.model).__name__
    unembedding = anatomy.modules.get(anatomy.unembedding or "")
    weight = getattr(unembedding, "weight", None)
    if unembedding is None or not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return f"{name} has none, or one that cannot be found"
    watch = _Watch(anatomy)
    with trial(model), watch:
        logits = logits_of(run_few_tokens(model))
        return _found(anatomy, unembedding, watch, logits)


def _found(anatomy: Anatomy, unembedding: nn.Module, watch: "_Watch", logits: Tensor | None) -> FoundHead | str:
    name, final = type(anatomy.model).__name__, watch.final
    weight, bias = unembedding.get_parameter("weight"), getattr(unembedding, "bias", None)
    if final is None or logits is None or logits.ndim != final.ndim:
        return f"a run of {name} over a few tokens gives no logits of the rows that its last block returns"
    plain = LMHeadSpec(norm="none", dtype=anatomy.dtype)
    caps = [
        value for key, value in vars(anatomy.config).items() if "cap" in key and type(value) in (int, float) and value
    ]
    for way in _ways(_Way(spec=plain, paths={}, hidden=final), watch.steps, anatomy.config):
        if way.hidden.shape[-1] != weight.shape[-1] or logits.shape[-1] != len(weight):
            continue
        found = F.linear(way.hidden.to(weight.dtype), weight, bias)
        for cap in (None, *caps):
            scale = _scale(found, logits, _numbers(anatomy.config)) if cap is None else _of_cap(found, logits, cap)
            if scale is not None:
                return FoundHead(
                    spec=replace(way.spec, logit_scale=scale, softcap=cap),
                    paths={**way.paths, "unembed": anatomy.unembedding or ""},
                    seen={"final": final, "logits": logits},
                )
    return (
        f"what {name} does between its last block and its logits is no norm, projection, dense layer, unembedding, "
        "scale and soft cap, of which the files of an LM head are made"
    )


class _Watch:
    """Watches what a model runs after its last block.

    Attributes:
        final: What the last block returned; None before it ran.
        steps: The calls of modules outside the blocks since then.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self.final: Tensor | None = None
        self.steps: list[_Step] = []
        self._anatomy = anatomy
        self._stack = ExitStack()

    def __enter__(self) -> "_Watch":
        last, blocks = self._anatomy.blocks[-1], tuple(f"{path}." for path in self._anatomy.blocks)
        with ExitStack() as stack:
            for path, module in self._anatomy.modules.items():
                if path == last:
                    stack.callback(module.register_forward_hook(self._end).remove)
                elif not path.startswith(blocks):
                    hook = self._after(path)
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _end(self, _module: nn.Module, _args: object, output: Any) -> None:
        self.final, self.steps = output_item(output, None, "the last block").detach().clone(), []

    def _after(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.final is None:
                return
            try:
                taken, given = input_item(args, kwargs, None, path), output_item(output, None, path)
            except CaptureError:  # it takes or gives no tensor
                return
            if taken.is_floating_point() and taken.shape[:-1] == given.shape[:-1]:
                step = _Step(path=path, module=module, taken=taken.detach().clone(), given=given.detach().clone())
                self.steps.append(step)

        return hook


def _ways(start: _Way, steps: Iterable[_Step], config: object) -> Iterator[_Way]:
    """Yield the ways from a stream on, the shortest first: norm, then projection, then dense layer with norm."""
    steps = list(steps)
    streams = [start, *(way for step in _on(start, steps) if (way := _normed(start, step, config)) is not None)]
    yield from streams
    for way in streams:
        for step in _on(way, steps):
            if not _is_dense(step.module):
                continue
            if getattr(step.module, "bias", None) is None:
                yield replace(way, paths={**way.paths, "project_out": step.path}, hidden=step.given)
            yield from _transformed(way, step, steps, config)


def _on(way: _Way, steps: Iterable[_Step]) -> Iterator[_Step]:
    return (step for step in steps if step.taken.shape == way.hidden.shape and torch.equal(step.taken, way.hidden))


def _is_dense(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not list(module.children())


def _normed(way: _Way, step: _Step, config: object) -> _Way | None:
    """Return the way through a module that takes the stream, if it is a norm."""
    found = _norm_of(step, config)
    if found is None:
        return None
    kind, eps, offset = found
    spec = replace(way.spec, norm=kind, eps=eps, weight_offset=offset)
    return _Way(spec=spec, paths={"norm": step.path}, hidden=step.given)


def _norm_of(step: _Step, config: object) -> tuple[Norm, float, float] | None:
    """Return the kind of a norm, its epsilon, and what it adds to its weight; None if the module is no norm."""
    weight, bias = getattr(step.module, "weight", None), getattr(step.module, "bias", None)
    if step.taken.shape != step.given.shape or (isinstance(weight, Tensor) and weight.ndim != 1):
        return None
    own = [value for name, value in vars(step.module).items() if "eps" in name]
    eps = dict.fromkeys(value for value in (*own, *_numbers(config), *_USUAL_EPS) if _is_eps(value))
    tried: list[tuple[float, tuple[Norm, float, float]]] = []
    for value in eps:
        for kind, offset in _KINDS:
            made = normed(kind, step.taken, weight, bias, value, offset)
            tried.append((_error(made, step.given), (kind, value, offset)))
    least = min(error for error, _ in tried)
    if least > _SAME.get(step.given.dtype, _SAME_LOW_PRECISION):
        return None
    return next(found for error, found in tried if error <= 2 * least)  # its own epsilon comes first


def _is_eps(value: object) -> bool:
    return isinstance(value, float) and 0 < value < _LARGEST_EPS


def normed(
    kind: Norm, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float
) -> Tensor:
    """Return a stream after a norm, in at least float32, as `residua.store.format.sidecars` says.

    Args:
        kind: Kind of the norm.
        hidden: The stream, (..., width).
        weight: Its weight, (width,); None for none.
        bias: Its bias, likewise.
        eps: What it adds to the variance or the mean square.
        weight_offset: What is added to the weight.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    hidden, weight, bias = hidden.to(wide), *(None if each is None else each.to(wide) for each in (weight, bias))
    if kind == "layer":
        return F.layer_norm(hidden, hidden.shape[-1:], weight, bias, eps)
    if kind == "rms":
        return F.rms_norm(hidden, hidden.shape[-1:], None if weight is None else weight_offset + weight, eps)
    return hidden


def _transformed(way: _Way, dense: _Step, steps: Iterable[_Step], config: object) -> Iterator[_Way]:
    """Yield the way through a dense layer, an activation and a layer norm, if there is one (BERT and its like)."""
    for step in steps:
        if step.taken.shape != dense.given.shape or step.path == dense.path:
            continue
        found = _norm_of(step, config)
        if found is None or found[0] != "layer":
            continue
        for name in get_args(Activation):
            activation: Activation = name
            made = ACT2FN[activation](dense.given)
            if _error(made, step.taken) <= _SAME.get(made.dtype, _SAME_LOW_PRECISION):
                spec = replace(way.spec, activation=activation, transform_eps=found[1])
                paths = {**way.paths, "transform.dense": dense.path, "transform.norm": step.path}
                yield _Way(spec=spec, paths=paths, hidden=step.given)
                return


def _of_cap(found: Tensor, logits: Tensor, cap: float) -> float | None:
    capped = torch.tanh(found.double() / cap) * cap
    return 1.0 if _error(capped, logits) <= _SAME.get(found.dtype, _SAME_LOW_PRECISION) else None


def _scale(found: Tensor, logits: Tensor, numbers: Iterable[float]) -> float | None:
    """Return the factor between what an unembedding gives and the logits; None if they differ in more than that."""
    one, other = found.double(), logits.double()
    tolerance = _SAME.get(found.dtype, _SAME_LOW_PRECISION)
    square = float(one.square().sum())
    factor = float((one * other).sum()) / square if square > 0 else 0.0
    if not factor or _error(one * factor, other) > tolerance:
        return None
    close = [value for each in (1.0, *numbers) if each for value in (each, 1 / each, each**-0.5)]
    slack = _SAME_FACTOR.get(found.dtype, _SAME_FACTOR_LOW_PRECISION) * abs(factor)
    return next((value for value in close if abs(value - factor) <= slack), factor)


def _numbers(config: object) -> list[float]:
    """Return the positive numbers of a config, among which a model's factors and epsilons are."""
    values = [
        value for value in vars(config).values() if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return [float(value) for value in values if value > 0]


def _error(found: Tensor, wanted: Tensor) -> float:
    """Return the largest error as a part of the largest value."""
    if found.shape != wanted.shape:
        return float("inf")
    error = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-30)
    return float(error) if bool(torch.isfinite(error)) else float("inf")
