"""Arguments of a recorded call: each that decides about tokens or positions is understood, or refused by name."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from residua.capture.recording.arguments import read_call
from residua.store.base.errors import CaptureError
from residua.store.examples.index import INPUT_PREFIX, NO_TOKEN, OTHER_INPUTS
from tests.models.tiny import TINY

NAMES = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels", "use_cache")
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
PACKED = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]])


def documents(**kwargs: Any) -> list[list[int]]:
    """Return the tokens of each example of a call."""
    examples, _ = read_call(NAMES, (), kwargs).examples(None, {})
    return [example.input_ids.tolist() for example in examples]


@pytest.mark.parametrize(
    "extra",
    [
        {"position_ids": torch.arange(5)[None]},
        {"position_ids": torch.arange(5).expand(2, 5)},
        {"position_ids": torch.arange(5).expand(3, 2, 5)},
        {"labels": IDS + 50},
        {"past_key_values": DynamicCache()},
        {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())},
        {"cache_position": torch.arange(5)},
        {"use_cache": True},
        {"inputs_embeds": None, "position_ids": None},
    ],
)
def test_arguments_without_a_say_in_tokens_change_nothing(extra: dict[str, Any]) -> None:
    assert documents(input_ids=IDS, **extra) == IDS.tolist()


@pytest.mark.parametrize("name", ["position_ids", "labels", "token_type_ids"])
def test_tokens_are_input_ids_only(name: str) -> None:
    """Whole numbers of the same shape are not taken for tokens."""
    call = read_call(NAMES, (), {name: torch.arange(5).expand(2, 5), "inputs_embeds": torch.zeros(2, 5, 8)})
    examples, _ = call.examples(None, {})
    assert call.input_ids is None
    assert [example.input_ids.tolist() for example in examples] == [[NO_TOKEN] * 5] * 2


def filled(kind: str) -> Any:
    """Return a cache of a call with eight tokens."""
    model = TINY["llama"]()
    cache = StaticCache(config=model.config, max_cache_len=32) if kind == "static" else DynamicCache()
    with torch.no_grad():
        model(torch.arange(3, 11)[None], past_key_values=cache)
    return [(torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 4))] if kind == "tuples" else cache


@pytest.mark.parametrize("kind", ["dynamic", "static", "tuples"])
def test_a_call_that_goes_on_is_refused(kind: str) -> None:
    with pytest.raises(CaptureError, match=r"past_key_values.* earlier calls"):
        read_call(NAMES, (), {"input_ids": IDS, "past_key_values": filled(kind)})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cache_position", torch.arange(3, 8)),
        ("position_ids", torch.arange(3, 8)[None]),
        ("position_ids", torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 7, 8]])),
        ("position_ids", torch.tensor([[0, 1, 2, 3, 4], [0, 1, 1, 2, 3]])),
        ("position_ids", torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 1, 2]])),
        ("position_ids", torch.zeros(2, 4, dtype=torch.long)),
        ("position_ids", torch.arange(5.0)[None]),
        ("position_ids", torch.stack([PACKED, PACKED + 1, PACKED + 2])),
        ("attention_mask", torch.ones(2, 5, 5)),
        ("attention_mask", torch.ones(2, 1, 5, 5)),
        ("attention_mask", {"full_attention": torch.ones(2, 1, 5, 5)}),
        ("attention_mask", torch.ones(2, 9)),
        ("attention_mask", torch.tensor([[1, 1, 2, 2, 2], [1, 1, 1, 1, 1]])),
        ("attention_mask", torch.tensor([[0.0, 0.0, 0.0, 0.0, -1e9]] * 2)),
        ("attention_mask", torch.zeros(2, 5)),
        ("attention_mask", torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]])),
        ("decoder_input_ids", IDS),
        ("decoder_attention_mask", torch.ones(2, 5)),
        ("encoder_outputs", (torch.zeros(2, 5, 8),)),
        ("cu_seq_lens_q", torch.tensor([0, 2, 5, 10])),
        ("seq_idx", torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])),
        ("input_ids", IDS.float()),
        ("input_ids", IDS[0]),
        ("input_ids", IDS - 7),
        ("input_ids", IDS + 2**31),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(CaptureError, match=name):
        read_call(NAMES, (), {"input_ids": IDS, name: value})


PARTS = [[5, 6], [7, 8, 9], [10, 11, 12, 13, 14]]


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"cu_seq_lens_q": torch.tensor([0, 2, 5, 10]), "cu_seq_lens_k": torch.tensor([0, 2, 5, 10]), "max_length_q": 5},
        {"seq_idx": torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 2, 2]])},
        {"position_ids": torch.stack([PACKED, PACKED, PACKED])},
        {"position_ids": torch.stack([PACKED, PACKED + 3, PACKED + 1, PACKED])},
    ],
)
def test_packed_documents_become_examples(extra: dict[str, Any]) -> None:
    call = read_call(NAMES, (), {"input_ids": IDS, "position_ids": PACKED, "use_cache": False} | extra)
    keep = np.array([[True, False, True, True, True], [True, True, False, False, True]])
    examples, rows = call.examples(keep, {"per_document": ["a", "b", "c"], "per_sequence": [1, 2]})
    assert [example.input_ids.tolist() for example in examples] == PARTS
    assert [example.positions.tolist() for example in examples] == [[0], [0, 1, 2], [0, 1, 4]]
    assert [row.padded.tolist() for row in rows] == [[0, 1], [2, 3, 4], [0, 1, 2, 3, 4]]
    assert [row.first_row for row in rows] == [0, 1, 4]
    columns = [{name: value for name, value in example.columns.items() if name != OTHER_INPUTS} for example in examples]
    assert columns == [
        {"per_document": document, "per_sequence": sequence}
        for document, sequence in zip("abc", (1, 1, 2), strict=True)
    ]
    assert any("packed" in note for note in call.notes)


def test_documents_packed_with_padding_are_examples_too() -> None:
    """Padding after the last document has any position; a model without a cache and a mask may be packed so."""
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    numbers = torch.tensor([[0, 0, 1, 2, 3], [0, 1, 2, 3, 1]])
    assert documents(input_ids=IDS, attention_mask=mask, position_ids=numbers) == [[6, 7, 8, 9], [10, 11, 12, 13]]


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ({"attention_mask": torch.ones_like(IDS), "use_cache": False}, "attention_mask"),
        ({}, "use_cache"),
        ({"use_cache": False, "past_key_values": DynamicCache()}, "cache"),
        ({"use_cache": False, "cu_seq_lens_q": torch.tensor([0, 5, 10])}, "cu_seq_lens_q"),
        ({"use_cache": False, "seq_idx": torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]])}, "seq_idx"),
    ],
)
def test_packed_documents_that_would_see_each_other_are_refused(extra: dict[str, Any], word: str) -> None:
    with pytest.raises(CaptureError, match=word):
        read_call(NAMES, (), {"input_ids": IDS, "position_ids": PACKED, **extra})


def test_a_model_that_numbers_positions_from_elsewhere_is_followed() -> None:
    roberta = {"input_ids": IDS, "position_ids": torch.arange(2, 7)[None]}
    examples, _ = read_call(NAMES, (), roberta, first_position=2).examples(None, {})
    assert [example.input_ids.tolist() for example in examples] == IDS.tolist()
    with pytest.raises(CaptureError, match="from 2"):
        read_call(NAMES, (), roberta | {"position_ids": torch.arange(5)[None]}, first_position=2)


@pytest.mark.parametrize(
    ("extra", "names"),
    [
        ({}, ()),
        ({"token_type_ids": torch.zeros_like(IDS)}, ()),
        ({"mm_token_type_ids": torch.zeros_like(IDS)}, ()),
        ({"labels": IDS, "use_cache": False, "output_hidden_states": True, "logits_to_keep": torch.tensor(1)}, ()),
        ({"token_type_ids": IDS % 2}, ("token_type_ids",)),
        ({"pixel_values": torch.zeros(2, 3, 4, 4), "image_sizes": torch.zeros(2, 2)}, ("pixel_values", "image_sizes")),
        ({"images": [torch.zeros(3, 4, 4)] * 2}, ("images",)),
        ({"vision": {"pixels": torch.zeros(1)}}, ("vision",)),
        ({"position_ids": torch.stack([torch.arange(5), torch.ones(5), torch.ones(5)])[:, None].long()}, None),
        ({"inputs_embeds": torch.zeros(2, 5, 8)}, ("inputs_embeds",)),
    ],
)
def test_other_inputs_are_kept_by_name(extra: dict[str, Any], names: tuple[str, ...] | None) -> None:
    call = read_call(NAMES, (), {"input_ids": IDS, **extra})
    assert call.others == (("position_ids",) if names is None else names)
    examples, _ = call.examples(None, {"label": [1, 2]})
    expected: dict[str, Any] = {OTHER_INPUTS: list(call.others)} if call.others else {}
    for number, example in enumerate(examples):
        numbers = {INPUT_PREFIX + name: extra[name][number].tolist() for name in call.inputs}
        assert example.columns == {"label": number + 1, **expected, **numbers}
    assert list(call.inputs) == [name for name in call.others if name == "token_type_ids"]
    with pytest.raises(CaptureError, match=OTHER_INPUTS):
        call.examples(None, {OTHER_INPUTS: [1, 2]})


@pytest.mark.parametrize("names", [("idx", "targets"), ("x",), ()])
def test_a_model_without_input_ids_takes_its_tokens_first(names: tuple[str, ...]) -> None:
    call = read_call(names, (IDS, IDS + 1), {})
    assert call.input_ids is not None
    assert call.input_ids.tolist() == IDS.tolist()


@pytest.mark.parametrize(
    ("names", "args"),
    [(("labels", "x"), (IDS, torch.zeros(2, 3))), (("x",), (torch.ones(2, 5, dtype=torch.bool),)), (("x", "y"), ())],
)
def test_what_is_no_token_id_is_not_taken_for_one(names: tuple[str, ...], args: tuple[Any, ...]) -> None:
    call = read_call(names, args, {} if args else {"y": IDS})
    assert call.input_ids is None
    assert call.shape == (2, 1)


def test_left_padding_without_positions_is_seen() -> None:
    left, right = torch.tensor([[0, 0, 1, 1, 1], [1] * 5]), torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    counted = (left.cumsum(-1) - 1).clamp(min=0)
    assert read_call(NAMES, (IDS, left), {}).pads_left
    assert not read_call(NAMES, (IDS, right), {}).pads_left
    assert not read_call(NAMES, (IDS, left, counted), {}).pads_left
    assert read_call(("input_ids", "attention_mask"), (IDS, left), {}).pads_left
