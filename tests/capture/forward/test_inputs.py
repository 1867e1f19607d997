"""Padded batches, and that padding changes no row."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from residua.capture.forward.inputs import forward_kwargs, padded_batch, positions_of
from residua.capture.sites.names_to_modules import model_sites
from residua.capture.taps.tap import tap
from tests.capture.site_readings import LENGTHS, batch, read, sequences
from tests.models.tiny import ODD, TINY
from tests.unlike_models import UNLIKE

TOLERANCE = 2e-5


@given(
    st.lists(st.lists(st.integers(1, 1000), min_size=1, max_size=9), min_size=1, max_size=5),
    st.sampled_from(["left", "right"]),
)
def test_a_batch_holds_each_sequence_once(examples: list[list[int]], side: str) -> None:
    padded = padded_batch(examples, side="left" if side == "left" else "right")
    assert padded.input_ids.dtype == padded.attention_mask.dtype == torch.int64
    positions = positions_of(padded.attention_mask)
    assert padded.input_ids.shape == (len(examples), max(map(len, examples)))
    for row, example in enumerate(examples):
        kept = padded.attention_mask[row].bool()
        assert padded.input_ids[row][kept].tolist() == example
        assert positions[row][kept].tolist() == list(range(len(example)))
        assert (padded.input_ids[row][~kept] == 0).all()
        edge = padded.attention_mask[row, -1 if side == "left" else 0]
        assert edge == 1
    assert int(positions.max()) < padded.input_ids.shape[1]


@pytest.mark.parametrize("examples", [[], [[1, 2], []]])
def test_batches_without_a_token_are_refused(examples: Sequence[Sequence[int]]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        padded_batch(examples)


def rows(value: Tensor, example: int, side: str) -> Tensor:
    """Return the rows of one example."""
    n_tokens, n_positions = LENGTHS[example], max(LENGTHS)
    kept = slice(n_positions - n_tokens, None) if side == "left" else slice(n_tokens)
    return value[example, kept]


@pytest.mark.parametrize("name", [*TINY, *ODD])
def test_a_row_is_the_same_whichever_side_is_padded(name: str) -> None:
    """Within 2e-5 of the largest value of the site; padding would shift it by far more."""
    model = {**TINY, **ODD}[name]()
    sites = [site for site in model_sites(model) if not site.startswith("pattern")]
    left, right = read(model, sites, batch("left")), read(model, sites, batch("right"))
    for example, tokens in enumerate(sequences()):
        alone = read(model, sites, padded_batch([tokens]))
        for site in sites:
            single = alone[site][0]
            bound = TOLERANCE * float(single.abs().max())
            assert (rows(left[site], example, "left") - single).abs().max() <= bound, site
            assert (rows(right[site], example, "right") - single).abs().max() <= bound, site


def test_patterns_are_the_same_on_their_own_keys() -> None:
    model = TINY["mistral"]()
    left, right = read(model, "pattern.1", batch("left")), read(model, "pattern.1", batch("right"))
    for example, n_tokens in enumerate(LENGTHS):
        ours = rows(left["pattern.1"], example, "left")[..., max(LENGTHS) - n_tokens :]
        theirs = rows(right["pattern.1"], example, "right")[..., :n_tokens]
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", [*TINY, *ODD])
def test_without_padding_the_arguments_are_the_models_own_defaults(name: str) -> None:
    model, padded = {**TINY, **ODD}[name](), padded_batch(sequences()[:1])
    with torch.no_grad():
        ours = model(**forward_kwargs(model, padded.input_ids, padded.attention_mask)).logits
        assert torch.equal(ours, model(padded.input_ids).logits)


@pytest.mark.parametrize("name", ["gpt2", "bert", "opt"])
def test_padding_on_the_left_without_position_ids_would_shift_rows(name: str) -> None:
    model, padded = TINY[name](), batch("left")
    kwargs = forward_kwargs(model, padded.input_ids, padded.attention_mask)
    with torch.no_grad():
        right = model(**kwargs).logits[1, -1]
        del kwargs["position_ids"]
        shifted = (model(**kwargs).logits[1, -1] - right).abs().max()
    assert (shifted > 0.1) == (name != "opt")  # OPT counts positions by the mask itself


def test_a_model_gets_only_arguments_that_it_takes() -> None:
    padded = batch()
    bert = forward_kwargs(TINY["bert"](), padded.input_ids, padded.attention_mask)
    assert set(bert) == {"input_ids", "attention_mask", "position_ids"}
    llama = forward_kwargs(TINY["llama"](), padded.input_ids, padded.attention_mask)
    assert set(llama) == {"input_ids", "attention_mask", "position_ids", "use_cache"}
    assert llama["use_cache"] is False


@pytest.mark.parametrize("name", ["mra", "yoso", "nystromformer", "roberta", "stablelm", "gemma4", "ibert"])
def test_positions_begin_where_the_models_do(name: str) -> None:
    model = {**ODD, **UNLIKE}[name]()
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ours = model(**forward_kwargs(model, ids, torch.ones_like(ids))).logits
    torch.testing.assert_close(ours, alone)


def test_positions_that_a_model_numbers_in_another_way_are_not_passed() -> None:
    assert "position_ids" in forward_kwargs(TINY["llama"](), torch.ones(1, 3).long(), torch.ones(1, 3).long())
    model = UNLIKE["stablelm"]()
    inner, forward = model.base_model, model.base_model.forward

    def counted_from_seven(*args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        ids = torch.arange(7, 7 + kwargs["input_ids"].shape[1])[None] * 3 if position_ids is None else position_ids
        return forward(*args, position_ids=ids, **kwargs)

    vars(inner)["forward"] = counted_from_seven
    ids = torch.arange(5, 14)[None]
    assert "position_ids" not in forward_kwargs(model, ids, torch.ones_like(ids))


@pytest.mark.parametrize("name", ["gemma4", "gemma4-shared-keys", "stablelm", "olmo2"])
def test_a_model_that_leaves_out_logits_computes_all_rows_and_those_of_the_last_position(name: str) -> None:
    model = {**ODD, **UNLIKE}[name]()
    ids = torch.arange(5, 23).view(2, 9)
    with torch.no_grad():
        full = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        states = full.hidden_states
        kept: dict[str, Tensor] = {}
        with tap(model, "resid_post.*", kept.__setitem__):
            last = model(**forward_kwargs(model, ids, torch.ones_like(ids), needs_logits=False)).logits
    torch.testing.assert_close(last, full.logits[:, -1:])
    for layer, state in enumerate(states[1:-1]):
        torch.testing.assert_close(kept[f"resid_post.{layer}"], state)
    assert kept["resid_post.2"].shape == states[-1].shape
