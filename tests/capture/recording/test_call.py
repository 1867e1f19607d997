"""Reading a call of the user's model: tokens, mask, examples and columns."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch

from residua.capture.recording.arguments import read_call
from residua.capture.recording.call import Call
from residua.store.base.errors import CaptureError
from residua.store.examples.index import NO_TOKEN

IDS = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
NAMES = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")


def forward(input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> None:
    """Take what a language model takes."""


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((IDS, MASK), {}),
        ((IDS,), {"attention_mask": MASK}),
        ((), {"input_ids": IDS, "attention_mask": MASK}),
        ((), {"attention_mask": MASK, "input_ids": IDS}),
        ((), {"token_type_ids": MASK, "input_ids": IDS, "attention_mask": MASK.bool()}),
        ((IDS,), {"attention_mask": MASK.float()}),
    ],
)
def test_tokens_and_mask_are_found_however_they_are_passed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call = read_call(inspect.signature(forward).parameters, args, kwargs)
    assert call.input_ids is not None
    assert call.input_ids.dtype == np.int32
    assert call.input_ids.tolist() == IDS.tolist()
    assert call.mask.tolist() == MASK.bool().tolist()
    assert call.shape == (2, 4)


def test_without_a_mask_every_position_is_a_token() -> None:
    call = read_call(NAMES, (IDS,), {"attention_mask": None})
    assert call.mask.tolist() == [[True] * 4] * 2


@pytest.mark.parametrize(
    "image", [torch.zeros(3, 3, 8, 8), torch.zeros(3, 16), torch.zeros(3, 1, 2, dtype=torch.uint8)]
)
def test_without_tokens_an_example_is_a_row(image: torch.Tensor) -> None:
    call = read_call(("scale", "pixels"), (torch.tensor(0.5), image), {})
    assert call.input_ids is None
    assert call.mask.tolist() == [[True]] * 3
    examples, rows = call.examples(None, {})
    assert [example.input_ids.tolist() for example in examples] == [[NO_TOKEN]] * 3
    assert [row.padded.tolist() for row in rows] == [[0]] * 3


@pytest.mark.parametrize(
    "kwargs", [{}, {"input_ids": [[1, 2]]}, {"attention_mask": MASK}, {"input_ids": torch.tensor(3)}]
)
def test_a_call_without_examples_to_count_is_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(CaptureError, match="without a tensor"):
        read_call(NAMES, (), kwargs)


def test_the_mask_is_never_taken_for_tokens() -> None:
    call = read_call(NAMES, (), {"attention_mask": MASK, "inputs_embeds": torch.zeros(2, 4, 8)})
    assert call.input_ids is None


@pytest.mark.parametrize("mask", [torch.ones(2, 5), torch.ones(2, 1, 4, 4), [[1, 1, 1, 1]] * 2])
def test_a_mask_of_another_shape_is_refused(mask: Any) -> None:
    with pytest.raises(CaptureError, match="attention_mask"):
        read_call(NAMES, (IDS,), {"attention_mask": mask})


def test_examples_lose_their_padding_and_keep_their_columns() -> None:
    call = read_call(NAMES, (IDS, MASK), {})
    keep = np.array([[True, False, False, True], [True, True, False, True]])
    examples, rows = call.examples(keep, {"label": ["a", "b"], "score": torch.tensor([1.5, 2.5])})
    assert [example.input_ids.tolist() for example in examples] == [[5, 6, 7, 8], [9, 10]]
    assert [example.positions.tolist() for example in examples] == [[0, 3], [1]], "padding never becomes a row"
    assert [row.padded.tolist() for row in rows] == [[0, 1, 2, 3], [2, 3]]
    assert [example.columns for example in examples] == [{"label": "a", "score": 1.5}, {"label": "b", "score": 2.5}]


def test_columns_of_tensors_and_arrays_become_plain_values() -> None:
    call = read_call(NAMES, (IDS, MASK), {})
    columns: dict[str, Any] = {"label": torch.tensor([3, 4]), "vector": np.array([[1, 2], [3, 4]])}
    examples, _ = call.examples(None, columns)
    assert [example.columns for example in examples] == [{"label": 3, "vector": [1, 2]}, {"label": 4, "vector": [3, 4]}]
    assert all(type(example.columns["label"]) is int for example in examples)


@pytest.mark.parametrize("shape", [(2, 1), (1, 4), (4,), (2, 5), (2, 4, 1), ()])
def test_keep_is_never_broadcast(shape: tuple[int, ...]) -> None:
    call = read_call(NAMES, (IDS, MASK), {})
    with pytest.raises(CaptureError, match=r"keep .* 2 examples of 4 positions"):
        call.examples(np.ones(shape, bool), {})


def test_a_column_needs_one_value_per_example() -> None:
    with pytest.raises(CaptureError, match=r"'label'.* 3 .* 2 "):
        read_call(NAMES, (IDS, MASK), {}).examples(None, {"label": [1, 2, 3]})


def test_examples_are_numbered_on_and_those_without_rows_count() -> None:
    ids, mask = IDS.numpy().astype(np.int32), np.array([[False] * 4, [True] * 4])
    _, rows = Call(input_ids=ids, mask=mask).examples(None, {}, first_example=7, first_row=100)
    assert [(row.example, row.first_row, len(row.positions)) for row in rows] == [(7, 100, 0), (8, 100, 4)]
    _, rows = Call(input_ids=ids, mask=mask[::-1]).examples(None, {}, first_row=5)
    assert [row.first_row for row in rows] == [5, 9]
