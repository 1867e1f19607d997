"""A padded batch, and every site of a tiny model, read once; for the tests of sites and taps."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import residua
from residua.capture.forward.inputs import PaddedBatch, forward_kwargs, padded_batch
from residua.capture.sites.names_to_modules import model_sites
from residua.capture.taps.reading import reading
from tests.models.tiny import ODD, TINY, VOCABULARY

torch.set_num_threads(1)

LENGTHS = (11, 4, 7)


def sequences() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, VOCABULARY, size=length).tolist() for length in LENGTHS]


def batch(side: str = "right") -> PaddedBatch:
    return padded_batch(sequences(), side="left" if side == "left" else "right")


def run(model: PreTrainedModel, padded: PaddedBatch | None = None, **options: bool) -> Tensor:
    """Logits of one forward call without gradients."""
    padded = padded or batch()
    with torch.no_grad():
        logits = model(**forward_kwargs(model, padded.input_ids, padded.attention_mask), **options).logits
    assert isinstance(logits, Tensor)
    return logits


@contextmanager
def attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Set a model's attention implementation as its users do."""
    before = model.config._attn_implementation or "eager"
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@dataclass(frozen=True)
class Reading:
    """A model, its logits, and the value of every site that was read."""

    model: PreTrainedModel
    logits: Tensor
    sites: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.sites[name]


def read(model: PreTrainedModel, sites: Iterable[str], padded: PaddedBatch | None = None) -> Reading:
    values: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> None:
        assert name not in values
        values[name] = tensor.clone()

    with reading(model, sites, keep) as taps:
        logits = run(model, padded)
        taps.end_forward()
    return Reading(model, logits, values)


@cache
def everything(name: str, dtype: torch.dtype = torch.float32) -> Reading:
    """Every canonical site of a tiny model, under eager attention, with padding on the left."""
    model = {**TINY, **ODD}[name]()
    nn.Module.to(model, dtype)  # the model's own ``to`` has no usable annotation
    return read(model, model_sites(model), batch("left"))


def loss_of(model: nn.Module) -> Tensor:
    """A scalar of the batch's logits, to take gradients of."""
    padded = batch()
    logits: Tensor = model(input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False).logits
    return logits.square().mean()


def tapped(model: nn.Module, sites: str, **options: Any) -> dict[str, Tensor]:
    """What a tap gets in one forward and backward pass."""
    kept: dict[str, Tensor] = {}
    with residua.tap(model, sites, kept.__setitem__, **options):
        loss_of(model).backward()  # type: ignore[no-untyped-call]  # torch has no annotations here
    return kept
