"""Which entry of a site's tensor is which row: one entry a position, in the shapes that modules give."""

import pytest
import torch

from residua.capture.buffers.rows import by_position, row_shape
from residua.store.base.errors import CaptureError

B, T = 2, 3


@pytest.mark.parametrize(
    ("shape", "row"),
    [
        ((B, T, 5), (5,)),
        ((B, T, 4, 5), (4, 5)),
        ((B, T), (1,)),
        ((B * T, 5), (5,)),
        ((B * T,), (1,)),
        ((B * T, 4, 5), (4, 5)),
    ],
)
def test_one_entry_a_position_in_any_shape(shape: tuple[int, ...], row: tuple[int, ...]) -> None:
    tensor = torch.arange(float(torch.Size(shape).numel())).view(shape)
    found = by_position("module:x@output", tensor, B, T)
    assert found.shape == (B, T, *row)
    assert row_shape(found) == row
    assert torch.equal(found.flatten(), tensor.flatten()), "rows lie example after example"


def test_a_transposed_tensor_needs_no_copy_to_be_right() -> None:
    tensor = torch.arange(30.0).view(5, B * T).t()
    assert torch.equal(by_position("module:x@output", tensor, B, T), tensor.reshape(B, T, 5))


@pytest.mark.parametrize("shape", [(), (B,), (B, 5), (B, T + 1, 5), (T, B, 5), (1, B, T, 5), (B * T + 1, 5)])
def test_anything_else_is_refused_by_name_and_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(CaptureError, match="module:x@output gave a tensor of shape") as caught:
        by_position("module:x@output", torch.zeros(shape), B, T)
    assert str(shape) in str(caught.value)
    assert "2 examples of 3 positions" in str(caught.value)


def test_whole_examples_are_rows_where_there_are_no_tokens() -> None:
    images = torch.arange(24.0).view(2, 3, 2, 2)
    found = by_position("module:conv@output", images, 2, 1)
    assert found.shape == (2, 1, 3, 2, 2)
    assert torch.equal(found[:, 0], images)
