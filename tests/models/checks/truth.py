"""What transformers itself gives for examples that run alone, without padding: the truth of the sweep.

Nothing here uses Residua. Tensors are those of one example each, without the batch axis where it leads.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

LENGTHS = (5, 9, 17, 30)
ROWS = 2e-4  # largest difference of stored rows, as a share of the largest value: other batches round differently
LOGITS = 1e-3


def examples_of(vocabulary: int, lengths: Sequence[int] = LENGTHS, *, lowest: int = 5) -> list[list[int]]:
    """Return examples of very different lengths, without special tokens."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(lowest, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def difference(found: Any, expected: Any) -> float:
    """Return the largest difference as a share of the largest value; infinite if shapes differ or values are none."""
    one, other = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    if one.shape != other.shape or not one.numel() or not bool(torch.isfinite(one).all()):
        return float("inf")
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-12))


def is_same(found: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors hold the same rows, whatever their axes before the last."""
    return found.numel() == expected.numel() and difference(found.reshape(-1), expected.reshape(-1)) <= ROWS


def run(model: PreTrainedModel, ids: Sequence[int], **options: Any) -> Any:
    """Run one example alone."""
    one = torch.tensor([list(ids)])
    kwargs: dict[str, Any] = {"input_ids": one, "attention_mask": torch.ones_like(one), **options}
    if "use_cache" in inspect.signature(model.forward).parameters:
        kwargs["use_cache"] = False
    with torch.no_grad():
        return model(**kwargs)


class ModuleLog:
    """What enters and leaves each module of a model in one run, copied.

    Attributes:
        taken: For each module that ran, its first tensor argument at each call.
        given: The first tensor that it returned at each call.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.taken: dict[str, list[Tensor]] = {}
        self.given: dict[str, list[Tensor]] = {}
        self._model = model

    def run(self, ids: Sequence[int], **options: Any) -> Any:
        """Run one example alone, and note every module."""
        with self.watching():
            return run(self._model, ids, **options)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what every module takes and gives in the call inside."""
        handles = []
        for name, module in self._model.named_modules():
            handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._after(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = first_tensor([*args, *kwargs.values()])
            if tensor is not None:
                self.taken.setdefault(name, []).append(tensor.detach().clone())

        return hook

    def _after(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: object, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None:
                self.given.setdefault(name, []).append(tensor.detach().clone())

        return hook


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor among a module's arguments or outputs, as far as they are not nested."""
    if isinstance(value, Tensor):
        return value
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return next((item for item in items if isinstance(item, Tensor)), None)


class Truth:
    """What transformers gives for each example alone.

    Attributes:
        ids: The examples.
        logits: (tokens, vocabulary) of each.
        hidden: All hidden states of each; None if the model gives none.
        weights: Attention weights of each under eager attention; None if the model gives none.
        log: What the modules gave for the last example.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[Sequence[int]]) -> None:
        self.ids = [list(each) for each in ids]
        outputs = [run(model, each, output_hidden_states=True) for each in ids]
        self.logits = [output.logits[0] for output in outputs]
        states = [states_of(output, "hidden_states") for output in outputs]
        self.hidden = [_of_tokens(found, len(each)) for found, each in zip(states, ids, strict=True)]
        self.log = ModuleLog(model)
        self.log.run(ids[-1])
        self.weights = _eager_weights(model, ids)
        self._model = model

    def again(self) -> Tensor:
        """Run the last example once more, and return its logits."""
        logits: Tensor = run(self._model, self.ids[-1]).logits
        return logits

    @property
    def is_finite(self) -> bool:
        """Whether the model gives numbers at all."""
        return all(bool(torch.isfinite(each).all()) for each in self.logits)


class StackTruth(Protocol):
    """What the same is of one stack of a model; see `Truth`."""

    ids: list[list[int]]
    logits: list[Tensor]
    hidden: list[tuple[Tensor, ...] | None]
    weights: list[tuple[Tensor, ...] | None]
    log: ModuleLog

    def again(self) -> Tensor:
        """Run the last example once more, and return its logits, or else its last hidden state."""
        ...


def _of_tokens(states: tuple[Tensor, ...] | None, n: int) -> tuple[Tensor, ...] | None:
    """Return states if they are of the tokens: a model that refines a canvas beside them gives those of the canvas."""
    return None if states is None or n not in states[-1].shape else states


def states_of(output: Any, name: str) -> tuple[Tensor, ...] | None:
    """Return the tensors of all layers that an output has under a name; None if there are none."""
    found = getattr(output, name, None)
    return tuple(found) if found else None


def _eager_weights(model: PreTrainedModel, ids: Sequence[Sequence[int]]) -> list[tuple[Tensor | None, ...] | None]:
    """Return attention weights under eager attention, which is switched on for these runs only.

    A run with ``output_attentions`` that gives other logits than one without has other weights too (Falcon loses its
    mask), so its weights are left out.
    """
    with eager(model):
        try:
            return [_weights_of(model, each) for each in ids]
        except Exception:  # noqa: BLE001 - a model without eager attention or attentions has no such truth
            return [None for _ in ids]


def _weights_of(model: PreTrainedModel, ids: Sequence[int]) -> tuple[Tensor | None, ...] | None:
    plain, output = run(model, ids), run(model, ids, output_attentions=True)
    return states_of(output, "attentions") if difference(output.logits, plain.logits) <= LOGITS else None


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """Switch a model to eager attention inside, as far as it can be switched."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        with suppress(ValueError):
            model.set_attn_implementation("eager")
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name
