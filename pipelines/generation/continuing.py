"""Prompts continued by the model: a unit at a time, padded on the left, or one by one where padding changes tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from residua.capture.forward.inputs import padded_batch
from residua.capture.identity.padding import padding_leaks
from residua.capture.runtime.devices import input_device
from residua.capture.runtime.wrappers import core_of
from residua.pipelines.generation.decoding import Decoding
from residua.store.base.errors import CaptureError
from residua.store.base.naming import named
from residua.store.examples.index import IntArray

ALONE = (
    "prompts were continued one by one, since padding would change what this model generates, or a setting of "
    "generation takes padding for tokens"
)


class Continuer:
    """Continues prompts.

    Args:
        model: The model, in evaluation mode.
        decoding: How new tokens are chosen.

    Attributes:
        alone: Whether prompts of different lengths are continued one by one.
    """

    def __init__(self, model: nn.Module, decoding: Decoding) -> None:
        self._core: Any = core_of(model)  # transformers' own annotation of generate fits no model
        self._decoding = decoding
        self.alone = decoding.sees_padding or padding_leaks(model, side="left") or padding_leaks(model)

    def continuations(self, prompts: Sequence[IntArray], seeds: Sequence[int]) -> list[list[int]]:
        """Return the new tokens of each prompt, the one that ends it included.

        Raises:
            CaptureError: There is too little memory for them.
        """
        has_padding = len({len(prompt) for prompt in prompts}) > 1
        if self.alone and has_padding:
            return [self._batch([prompt], [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]
        return self._batch(prompts, seeds)

    def _batch(self, prompts: Sequence[IntArray], seeds: Sequence[int]) -> list[list[int]]:
        device = input_device(self._core)
        padded = padded_batch(prompts, side="left", device=device)
        n_prompt = padded.input_ids.shape[1]
        try:
            found = self._core.generate(
                input_ids=padded.input_ids,
                attention_mask=padded.attention_mask,
                generation_config=self._decoding.config,
                logits_processor=self._decoding.processors(seeds, n_prompt, device),
            )
        except torch.OutOfMemoryError as error:
            raise CaptureError(
                f"{device} has too little memory to continue {len(prompts)} prompts of {n_prompt} tokens: lower "
                f"{named('batch_tokens')}"
            ) from error
        return [_until_end(row, self._decoding.end_ids) for row in found[:, n_prompt:].tolist()]


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Cut off the padding after the token that ended a continuation."""
    length = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:length]
