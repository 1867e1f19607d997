"""Loops that pad on the left and give no positions: the rows of each example are those that it has alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import residua
from residua.store.base.errors import CaptureError
from tests.capture.leaking_models import Averaged
from tests.models.tiny import _SIZES, ODD, TINY, VOCABULARY, _build
from tests.models.tiny_pairs import TINY_PAIRS

LENGTHS = (4, 9, 6)
WIDTH = max(LENGTHS)


def examples() -> list[list[int]]:
    rng = np.random.default_rng(2)
    return [rng.integers(3, VOCABULARY, length).tolist() for length in LENGTHS]


def padded() -> tuple[Tensor, Tensor]:
    ids, mask = torch.ones((2, len(LENGTHS), WIDTH), dtype=torch.long)
    for number, one in enumerate(examples()):
        ids[number, WIDTH - len(one) :] = torch.tensor(one)
        mask[number, : WIDTH - len(one)] = 0
    return ids, mask


BY_NAME: dict[str, Any] = {"position_ids": None}
CALLS = [
    *((name, (), BY_NAME) for name in ("gpt2", "bert", "roberta", "opt", "llama", "bloom", "gemma2")),
    ("gpt2", (), {}),
    ("bert", (None, None), {}),
    ("roberta", (None,), {}),
    ("llama", (None,), {}),
]
"""Models, and what follows in a call: after tokens and mask by position, or by name as the mask then is."""


@pytest.mark.parametrize(("name", "others", "by_name"), CALLS)
def test_rows_are_those_of_each_example_alone(
    name: str, others: tuple[None, ...], by_name: dict[str, Any], tmp_path: Path
) -> None:
    model, out = {**TINY, **ODD}[name](), tmp_path / "a.zarr"
    ids, mask = padded()
    named = {**({} if name == "bloom" else by_name), **({} if others else {"attention_mask": mask})}
    with residua.Recorder(model, sites="resid_post.1", out=out) as recorder, torch.no_grad():
        assert recorder is not None
        model(ids, *((mask, *others) if others else ()), **named)
    archive = residua.open(out)
    for number, one in enumerate(examples()):
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([one]), output_hidden_states=True).hidden_states[2][0]
        found = torch.from_numpy(archive.example(number)["resid_post.1"])
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)
    notes: Any = archive.provenance.get("notes", [])
    assert any("padded on the left" in note for note in notes) == (name != "bloom")


class Numbered(Averaged):  # type: ignore[no-untyped-call]  # transformers has no types here
    """Adds a vector for each position of the batch, padding counted, and keeps to the mask otherwise."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        hidden_BTD = self.embed(input_ids) + torch.arange(input_ids.shape[1])[:, None].sin()
        for layer in self.layers:
            hidden_BTD = hidden_BTD + layer(hidden_BTD).tanh()
        return CausalLMOutput(logits=self.lm_head(hidden_BTD))


def numbered() -> PreTrainedModel:
    return _build(Numbered, hf.LlamaConfig(**_SIZES))


def test_a_model_that_counts_padding_and_takes_no_positions_is_refused(tmp_path: Path) -> None:
    model, out = numbered(), tmp_path / "a.zarr"
    ids, mask = padded()
    with residua.Recorder(model, sites="module:layers.1@output", out=out) as recorder, torch.no_grad():
        assert recorder is not None
        with pytest.raises(CaptureError, match=r"left.*Numbered.*right"):
            model(input_ids=ids, attention_mask=mask)
        model(input_ids=ids.flip(1), attention_mask=mask.flip(1))
        model(input_ids=ids[:1, -4:])
    assert residua.open(out).n_rows == sum(LENGTHS) + 4


def pair(*, source: bool, target: bool) -> dict[str, Any]:
    """The arguments of a call of an encoder-decoder whose source and target are padded on the left, or on the right."""
    ids, mask = padded()
    sides = [(ids, mask) if left else (ids.flip(1), mask.flip(1)) for left in (source, target)]
    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    return {**dict(zip(names, [each for side in sides for each in side], strict=True)), "use_cache": False}


@pytest.mark.parametrize("left", [{"source": True, "target": False}, {"source": False, "target": True}])
@pytest.mark.parametrize(("name", "counts"), [("t5", False), ("bart", True), ("mbart", True), ("marian", True)])
def test_encoder_decoders_give_the_rows_of_each_pair_alone_or_refuse(
    name: str, counts: bool, left: dict[str, bool], tmp_path: Path
) -> None:
    model, out = TINY_PAIRS[name](), tmp_path / "a.zarr"
    call = pair(**left)
    with residua.Recorder(model, sites="decoder.resid_post.0", out=out) as recorder, torch.no_grad():
        assert recorder is not None
        if counts:
            with pytest.raises(CaptureError, match=rf"left.*{type(model).__name__}.*right"):
                model(**call)
            call = pair(source=False, target=False)
        model(**call)
    archive = residua.open(out)
    for number in range(len(LENGTHS)):
        kept = {name: call[name][number].bool() for name in ("attention_mask", "decoder_attention_mask")}
        alone = {
            "input_ids": call["input_ids"][number : number + 1, kept["attention_mask"]],
            "decoder_input_ids": call["decoder_input_ids"][number : number + 1, kept["decoder_attention_mask"]],
        }
        with torch.no_grad():
            wanted = model(**alone, output_hidden_states=True).decoder_hidden_states[1][0]
        found = torch.from_numpy(archive.example(number)["decoder.resid_post.0"])
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)
