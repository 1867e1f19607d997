"""Rows of a batch against numpy indexing and plain loops: runs, index copies, patterns, shapes that modules give."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from residua.capture.buffers.row_index import BatchRows, ExampleRows, RowIndex, batch_rows, by_position, row_shape
from residua.store.base.errors import CaptureError

torch.set_num_threads(1)
WIDTH = 3


@dataclass(frozen=True)
class Case:
    """Examples of a batch: where their tokens lie, which of them are kept, and the number of the first row."""

    mask: npt.NDArray[np.bool_]
    keep: npt.NDArray[np.bool_]
    first_row: int

    @property
    def rows(self) -> BatchRows:
        examples, row = [], self.first_row
        for b in range(len(self.mask)):
            padded = np.flatnonzero(self.mask[b]).astype(np.int64)
            positions = np.flatnonzero(self.keep[b][padded]).astype(np.int32)
            ids = (100 * b + np.arange(len(padded))).astype(np.int32)
            examples.append(
                ExampleRows(example=50 + b, first_row=row, input_ids=ids, positions=positions, padded=padded)
            )
            row += len(positions)
        return batch_rows(examples, self.mask.shape[1])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Masks with left padding, right padding and holes; some or all tokens kept."""
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 9)))
    bits = st.lists(st.booleans(), min_size=shape[1], max_size=shape[1])
    sides = st.integers(0, shape[1]).flatmap(
        lambda n: st.sampled_from([[True] * n + [False] * (shape[1] - n), [False] * (shape[1] - n) + [True] * n])
    )
    mask = np.array([draw(sides | bits) for _ in range(shape[0])])
    keep = np.array([draw(st.just([True] * shape[1]) | bits) for _ in range(shape[0])])
    return Case(mask, keep, draw(st.integers(0, 40)))


def every_row(case: Case) -> list[tuple[int, int, int]]:
    """Return (example, padded position, position in the example) of each kept token, by a plain loop."""
    rows = []
    for b, t in np.ndindex(case.mask.shape):
        if case.mask[b, t] and case.keep[b, t]:
            rows.append((b, t, int(case.mask[b, :t].sum())))
    return rows


@given(cases())
def test_rows_are_the_kept_tokens_in_order(case: Case) -> None:
    rows, expected = case.rows, every_row(case)
    n_positions = case.mask.shape[1]
    assert rows.source.tolist() == [b * n_positions + t for b, t, _ in expected]
    assert rows.row.tolist() == list(range(case.first_row, case.first_row + len(expected)))
    assert rows.position.tolist() == [position for _, _, position in expected]
    assert rows.token.tolist() == [100 * b + position for b, _, position in expected]
    assert rows.example.tolist() == [50 + b for b, _, _ in expected]
    dtypes = [values.dtype for values in (rows.source, rows.row, rows.token, rows.position, rows.example)]
    assert dtypes == [np.int64, np.int64, np.int32, np.int32, np.int64]


def test_a_batch_without_examples_has_no_rows() -> None:
    rows = batch_rows([], 7)
    assert rows.source.dtype == rows.row.dtype == np.int64
    assert rows.token.dtype == np.int32
    assert len(rows.source) == len(rows.row) == len(rows.token) == 0
    assert list(rows.per_shard(4)) == []


@given(cases(), st.sampled_from([1, 2, 4, 8, 64]))
def test_every_row_is_in_the_one_shard_that_it_belongs_to(case: Case, height: int) -> None:
    rows = case.rows
    found = {shard: rows.row[picked].tolist() for shard, picked in rows.per_shard(height)}
    expected: dict[int, list[int]] = {}
    for row in rows.row.tolist():
        expected.setdefault(row // height, []).append(row)
    assert found == expected


DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@settings(deadline=None)
@given(cases(), st.sampled_from([1, 2, 4, 8, 64]), DTYPES, DTYPES, st.booleans())
def test_a_copy_is_numpys_fancy_indexing_and_torchs_cast(
    case: Case, height: int, computed: torch.dtype, stored: torch.dtype, transposed: bool
) -> None:
    rows = case.rows
    n_flat = case.mask.size
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(n_flat, WIDTH, generator=generator, dtype=torch.float64).to(computed)
    if transposed:
        flat = flat.t().contiguous().t()
    cast = flat.to(stored).contiguous().view(torch.uint8).numpy().reshape(n_flat, -1)
    for shard, picked in rows.per_shard(height):
        buffer = torch.full((height, WIDTH), 7.0, dtype=stored)
        expected = buffer.clone().view(torch.uint8).numpy()
        source, target = rows.source[picked], rows.row[picked] - shard * height
        expected[target] = cast[source]
        RowIndex(source, target).copy(flat, buffer)
        assert np.array_equal(buffer.view(torch.uint8).numpy(), expected)


@settings(deadline=None)
@given(st.data())
def test_any_source_may_go_to_any_target(data: st.DataObject) -> None:
    n_flat, height = 30, 32
    source = np.array(data.draw(st.lists(st.integers(0, n_flat - 1), min_size=1, max_size=20, unique=True)), np.int64)
    target = np.array(
        data.draw(st.lists(st.integers(0, height - 1), min_size=len(source), max_size=len(source), unique=True)),
        np.int64,
    )
    if data.draw(st.booleans()):
        source, target = np.sort(source), np.sort(target)
    flat = torch.arange(n_flat * WIDTH, dtype=torch.float32).view(n_flat, WIDTH)
    buffer = torch.full((height, WIDTH), -1.0)
    expected = buffer.numpy().copy()
    expected[target] = flat.numpy()[source]
    row_index = RowIndex(source, target)
    row_index.copy(flat, buffer)
    assert np.array_equal(buffer.numpy(), expected)
    scattered = torch.full((height, WIDTH), -1.0)
    row_index.scatter(row_index.gather(flat, torch.float32), scattered)
    assert np.array_equal(scattered.numpy(), expected)


@settings(deadline=None)
@given(st.sets(st.integers(0, 39), min_size=1), st.sampled_from([1, 3, 8, 39, 40, 64]), st.booleans())
def test_the_blocks_of_a_shard_together_have_every_row(rows: set[int], height: int, backwards: bool) -> None:
    target = np.array(sorted(rows), np.int64)
    source = np.arange(len(target))[:: -1 if backwards else 1].copy()
    flat = torch.arange(len(target) * WIDTH, dtype=torch.float32).view(-1, WIDTH)
    blocks = [torch.full((height, WIDTH), -1.0) for _ in range(-(-40 // height))]
    for block, part in RowIndex(source, target).per_block(height):
        part.copy(flat, blocks[block])
    expected = np.full((len(blocks) * height, WIDTH), -1.0, np.float32)
    expected[target] = flat.numpy()[source]
    assert np.array_equal(torch.cat(blocks).numpy(), expected)


def joined(starts: list[int], lengths: list[int]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.booleans()), min_size=1, max_size=6),
    st.booleans(),
)
def test_runs_end_where_source_or_target_jumps(blocks: list[tuple[int, bool, bool]], backwards: bool) -> None:
    """Blocks of rows that may follow the one before directly, or not, on either side."""
    lengths = [length for length, _, _ in blocks]
    starts: dict[str, list[int]] = {"source": [], "target": []}
    ends = {"source": 0, "target": 0}
    for length, source_jumps, target_jumps in blocks:
        for side, jumps in (("source", source_jumps), ("target", target_jumps)):
            starts[side].append(ends[side] + 3 * jumps)
            ends[side] = starts[side][-1] + length
    source = joined(starts["source"], lengths)
    target = joined(starts["target"], lengths)
    if backwards:
        source = joined([ends["source"] - at - n for at, n in zip(starts["source"], lengths, strict=True)], lengths)
    flat = torch.arange(float(ends["source"]))[:, None]
    buffer = torch.full((ends["target"], 1), -1.0)
    expected = buffer.numpy().copy()
    expected[target] = flat.numpy()[source]
    RowIndex(source, target).copy(flat, buffer)
    assert np.array_equal(buffer.numpy(), expected)


@pytest.mark.parametrize(("step", "n_rows"), [(1, 20), (2, 20)], ids=["in runs", "by indices"])
def test_nan_payloads_and_signs_survive_both_paths(step: int, n_rows: int) -> None:
    bits = torch.tensor([0x7FC1, -0x8000, 0x7F80, -0x0080, -1], dtype=torch.int16).repeat(n_rows)
    flat = bits.view(torch.bfloat16).view(-1, 5)
    buffer = torch.zeros(n_rows, 5, dtype=torch.bfloat16)
    source = np.arange(0, n_rows, step, dtype=np.int64)
    RowIndex(source, source).copy(flat, buffer)
    assert torch.equal(buffer.view(torch.int16)[::step], flat.view(torch.int16)[::step])


@settings(deadline=None)
@given(cases(), st.integers(0, 3), st.sampled_from([torch.float32, torch.bfloat16]))
def test_patterns_have_the_examples_own_keys_and_zeros_behind_them(case: Case, spare: int, stored: torch.dtype) -> None:
    rows, n_heads = case.rows, 2
    n_examples, n_positions = case.mask.shape
    longest = int(case.mask.sum(-1).max()) + spare
    pattern = torch.rand(n_examples, n_positions, n_heads, n_positions, generator=torch.Generator().manual_seed(1))
    height = 64
    for shard, picked in rows.per_shard(height):
        buffer = torch.full((height, n_heads, longest), torch.nan, dtype=stored)
        target = rows.row[picked] - shard * height
        RowIndex(rows.source[picked], target).copy_pattern(pattern, buffer, rows)
        for row, (b, t, _) in zip(rows.row.tolist(), every_row(case), strict=True):
            if row // height != shard:
                continue
            keys = [k for k in range(n_positions) if case.mask[b, k]]
            expected = torch.zeros(n_heads, longest)
            for head in range(n_heads):
                for i, k in enumerate(keys):
                    expected[head, i] = pattern[b, t, head, k]
            assert torch.equal(buffer[row - shard * height], expected.to(stored))
        untouched = np.setdiff1d(np.arange(height), target)
        assert torch.isnan(buffer[torch.from_numpy(untouched)]).all()


def test_an_example_with_more_tokens_than_keys_is_an_error_that_says_so() -> None:
    rows = Case(np.ones((1, 5), bool), np.ones((1, 5), bool), 0).rows
    with pytest.raises(CaptureError, match=r"5 tokens, but rows of the pattern hold 4.*max_length"):
        RowIndex(rows.source, rows.row).copy_pattern(torch.zeros(1, 5, 2, 5), torch.zeros(8, 2, 4), rows)


B, T = 2, 3  # of the tensors that `by_position` takes


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
