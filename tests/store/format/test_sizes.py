"""Heights of chunks and shards: powers of two near their targets, inside the memory that staging may take."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from residua.store.base.errors import PlanError
from residua.store.format.sizes import (
    CHUNK_BYTES,
    COLUMN_BYTES,
    SHARD_BYTES,
    chunk_rows,
    n_stages,
    nearest_power_of_two,
    shard_rows,
    staging_bytes,
)

HEIGHTS = st.integers(0, 20).map(lambda power: 2**power)
WIDTHS = st.lists(st.integers(1, 2**20), min_size=1, max_size=8)


def is_power_of_two(value: int) -> bool:
    return value in {2**power for power in range(64)}


@given(st.floats(0, 2**40))
def test_no_power_of_two_is_nearer(value: float) -> None:
    found = nearest_power_of_two(value)
    assert is_power_of_two(found)
    assert abs(found - value) == min(abs(2**power - value) for power in range(42))


@pytest.mark.parametrize(
    ("value", "nearest"), [(0, 1), (1, 1), (1.49, 1), (1.51, 2), (3, 2), (3.01, 4), (5, 4), (7, 8)]
)
def test_a_tie_goes_to_the_smaller(value: float, nearest: int) -> None:
    assert nearest_power_of_two(value) == nearest


@given(st.integers(1, 2**31), HEIGHTS)
def test_a_chunk_is_about_half_a_mebibyte_and_divides_its_shard(row_bytes: int, height: int) -> None:
    rows = chunk_rows(row_bytes, height)
    assert is_power_of_two(rows)
    assert height % rows == 0
    if 1 < rows < height:
        assert CHUNK_BYTES / 1.5 <= rows * row_bytes <= CHUNK_BYTES * 4 / 3


@given(st.integers(1, 500), HEIGHTS, st.integers(0, 2**20))
def test_there_are_stages_for_every_shard_that_an_example_can_reach(most_rows: int, height: int, start: int) -> None:
    touched = {row // height for row in (start, start + most_rows - 1)}
    assert n_stages(most_rows, height) >= max(touched) - min(touched) + 1
    assert n_stages(most_rows, height) >= 2, "one fills while another is written"


@given(WIDTHS, st.integers(1, 10**5), st.integers(0, 5000), st.integers(2**20, 2**34))
def test_the_budget_holds_and_the_answer_is_always_the_same(
    widths: list[int], batch_rows: int, most_rows: int, budget: int
) -> None:
    def ask(sizes: list[int]) -> int:
        return shard_rows(sizes, batch_rows=batch_rows, most_rows_per_example=most_rows, host_memory_bytes=budget)

    if staging_bytes(sum(widths), most_rows, 1) > budget:
        with pytest.raises(PlanError, match=f"{budget:,} bytes"):
            ask(widths)
        return
    height = ask(widths)
    assert is_power_of_two(height)
    assert ask(widths[::-1]) == height, "only the widest site and the sum count"
    held = n_stages(most_rows, height) * height * (sum(widths) + COLUMN_BYTES)
    assert held <= budget
    ideal = max(nearest_power_of_two(SHARD_BYTES / max(widths)), 1 << (batch_rows - 1).bit_length())
    assert height <= ideal
    assert height == ideal or staging_bytes(sum(widths), most_rows, 2 * height) > budget


@given(WIDTHS, st.integers(1, 10**5), st.integers(0, 5000))
def test_more_memory_never_makes_shards_shorter(widths: list[int], batch_rows: int, most_rows: int) -> None:
    heights = []
    for power in range(20, 36):
        try:
            heights.append(
                shard_rows(widths, batch_rows=batch_rows, most_rows_per_example=most_rows, host_memory_bytes=2**power)
            )
        except PlanError:
            assert not heights, "what fits less memory fits more"
    assert all(small <= large for small, large in pairwise(heights))


def test_a_shard_holds_a_whole_batch_where_memory_allows() -> None:
    assert shard_rows([2**20], batch_rows=1, most_rows_per_example=10) == 32
    assert shard_rows([2**20], batch_rows=33, most_rows_per_example=10) == 64
