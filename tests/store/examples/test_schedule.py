"""The schedule against a simulation: whatever was committed before, the same batches fill what is missing."""

import random
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from residua.store.examples.index import ExampleIndex
from residua.store.examples.schedule import GrowingSchedule, Schedule
from residua.store.examples.table import ExampleTable

# Per example, its tokens and how many of them are kept.
EXAMPLES = st.lists(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), max_size=14)
HEIGHTS = st.sampled_from([1, 2, 4, 8, 64])
Batches = list[tuple[int, tuple[int, ...]]]


def index_of(examples: list[tuple[int, int]]) -> ExampleIndex:
    n_rows = np.array([rows for _, rows in examples], np.int32)
    return ExampleIndex(
        n_tokens=np.array([tokens for tokens, _ in examples], np.int32),
        n_rows=n_rows,
        first_row=np.array([sum(n_rows[:i]) for i in range(len(examples) + 1)], np.int64),
        first_example=np.array([0, len(examples)], np.int64),
        digest="",
    )


def schedule(examples: list[tuple[int, int]], height: int, batch_tokens: int) -> Schedule:
    return Schedule(index_of(examples), rows_per_shard=height, batch_tokens=batch_tokens)


def batches_of(work: Schedule, committed: set[int]) -> Batches:
    return [(batch.group, tuple(batch.examples.tolist())) for batch in work.work(committed)]


def rows_by_shard(examples: list[tuple[int, int]], height: int) -> dict[int, set[tuple[int, int]]]:
    """Return for each shard its rows as (example, number in the example), by counting rows one after another."""
    shards: dict[int, set[tuple[int, int]]] = {}
    row = 0
    for number, (_, n_rows) in enumerate(examples):
        for i in range(n_rows):
            shards.setdefault(row // height, set()).add((number, i))
            row += 1
    return shards


@given(EXAMPLES, HEIGHTS, st.integers(1, 30))
def test_one_run_computes_every_example_that_keeps_a_row_once(
    examples: list[tuple[int, int]], height: int, batch_tokens: int
) -> None:
    scheduled = batches_of(schedule(examples, height, batch_tokens), set())
    seen = [example for _, batch in scheduled for example in batch]
    assert sorted(seen) == [number for number, (_, n_rows) in enumerate(examples) if n_rows]


@given(EXAMPLES, HEIGHTS, st.integers(1, 30))
def test_batches_follow_the_format_page(examples: list[tuple[int, int]], height: int, batch_tokens: int) -> None:
    shards = rows_by_shard(examples, height)
    expected: Batches = []
    for shard in sorted(shards):
        group = sorted(number for number, i in shards[shard] if i == 0)
        batches: list[tuple[int, ...]] = []
        left = sorted(group, key=lambda number: -examples[number][0])
        while left:
            batch = [left.pop(0)]
            while left and examples[batch[0]][0] * (len(batch) + 1) <= batch_tokens:
                batch.append(left.pop(0))
            batches.append(tuple(batch))
        last = [batch for batch in batches if group[-1] in batch]
        expected += [(shard, batch) for batch in [*(b for b in batches if b not in last), *last]]
    assert batches_of(schedule(examples, height, batch_tokens), set()) == expected


@given(EXAMPLES, HEIGHTS, st.integers(1, 30), st.sets(st.integers(0, 60)))
def test_a_resumed_run_completes_every_missing_shard_and_runs_no_batch_needlessly(
    examples: list[tuple[int, int]], height: int, batch_tokens: int, committed: set[int]
) -> None:
    work = schedule(examples, height, batch_tokens)
    shards = rows_by_shard(examples, height)
    assert work.n_shards == len(shards)
    batches = batches_of(work, committed)
    uninterrupted = batches_of(work, set())
    assert [batch for batch in uninterrupted if batch in batches] == batches, "the same batches in the same order"
    filled: dict[int, set[tuple[int, int]]] = {shard: set() for shard in shards if shard not in committed}
    for _, batch in batches:
        rows = {(example, i) for example in batch for i in range(examples[example][1])}
        useful = {shard: rows & shards[shard] for shard in filled}
        assert any(useful.values()), f"batch {batch} fills nothing that is missing"
        for shard, found in useful.items():
            assert not filled[shard] & found, "no row is computed twice"
            filled[shard] |= found
    assert filled == {shard: rows for shard, rows in shards.items() if shard not in committed}


@given(EXAMPLES, HEIGHTS, st.integers(1, 30), st.sets(st.integers(0, 60)))
def test_only_the_last_batch_of_a_group_reaches_into_later_shards(
    examples: list[tuple[int, int]], height: int, batch_tokens: int, committed: set[int]
) -> None:
    work = schedule(examples, height, batch_tokens)
    shards = rows_by_shard(examples, height)
    for shard in range(work.n_shards):
        batches = work.batches(shard)
        ends = [
            max(s for s, rows in shards.items() for example, _ in rows if example in batch.examples)
            for batch in batches
        ]
        assert all(end == shard for end in ends[:-1])
        assert work.reach(shard) == (ends[-1] if ends else shard)


def test_an_example_over_many_shards_is_rerun_alone_with_its_batch_for_the_last_of_them() -> None:
    examples = [(2, 2), (20, 20), (3, 3)]
    work = schedule(examples, 4, 64)
    assert work.n_shards == 7
    assert batches_of(work, set()) == [(0, (1, 0)), (5, (2,))]
    assert batches_of(work, {0, 1, 2, 3, 4, 6}) == [(0, (1, 0)), (5, (2,))]
    assert batches_of(work, {0, 1, 2, 3, 4, 5}) == [(5, (2,))]
    assert batches_of(work, {1, 2, 3, 4, 5, 6}) == [(0, (1, 0))]
    assert batches_of(work, set(range(7))) == []


@pytest.mark.parametrize("examples", [[], [(3, 0)], [(3, 0), (1, 0)]])
def test_examples_without_rows_need_no_batch(examples: list[tuple[int, int]]) -> None:
    work = schedule(examples, 4, 8)
    assert (work.n_rows, work.n_shards, batches_of(work, set())) == (0, 0, [])


def test_an_example_longer_than_a_batch_runs_alone() -> None:
    assert batches_of(schedule([(9, 9), (1, 1), (1, 1)], 64, 4), set()) == [(0, (0,)), (0, (1, 2))]


@given(EXAMPLES, HEIGHTS, st.integers(1, 30), st.sets(st.integers(0, 60)), st.integers(0, 60), st.integers(0, 20))
def test_a_run_of_shards_is_completed_by_the_batches_that_reach_into_it(
    examples: list[tuple[int, int]], height: int, batch_tokens: int, committed: set[int], start: int, n: int
) -> None:
    work = schedule(examples, height, batch_tokens)
    shards = range(start, min(start + n, work.n_shards))
    rows = rows_by_shard(examples, height)
    missing = {shard: rows[shard] for shard in shards if shard not in committed}
    found = [(batch.group, tuple(batch.examples.tolist())) for batch in work.work(committed, shards)]

    def fills(batch: tuple[int, tuple[int, ...]]) -> bool:
        return any(example in batch[1] for shard in missing.values() for example, _ in shard)

    assert found == [batch for batch in batches_of(work, set()) if fills(batch)]


@given(EXAMPLES, HEIGHTS, st.integers(1, 30), st.integers(1, 9))
def test_runs_are_all_shards_in_order(
    examples: list[tuple[int, int]], height: int, batch_tokens: int, n_workers: int
) -> None:
    work = schedule(examples, height, batch_tokens)
    runs = work.runs(n_workers)
    assert [shard for run in runs for shard in run] == list(range(work.n_shards))
    assert all(runs)


@pytest.mark.parametrize("n_workers", [1, 2, 4, 9])
def test_runs_get_shorter_and_repeat_little(n_workers: int) -> None:
    chosen = random.Random(n_workers)
    lengths = [chosen.randint(1, 60) for _ in range(2000)]
    work = schedule([(n, n) for n in lengths], 128, 128)
    runs = work.runs(n_workers)
    left = work.n_shards
    for run in runs:
        assert len(run) <= max(5, 1.25 * (left / (2 * n_workers) + 1)), "the last worker keeps the others waiting"
        left -= len(run)
    repeated = sum(len(list(work.work(set(), run))) for run in runs) - len(list(work.work(set())))
    assert repeated <= len(runs)
    tokens = sum(lengths[e] for run in runs for b in work.work(set(), run) for e in b.examples) - sum(lengths)
    naive = 128 * (len(runs) - 1)
    assert tokens < 0.6 * naive, "they end where little is computed twice"


class GrowingTable:
    """A table whose parts appear one by one."""

    def __init__(self, examples: list[tuple[int, int]], stops: list[int], n_parts: int) -> None:
        self._examples, self._stops, self.n_parts = examples, stops, n_parts

    def is_whole(self) -> bool:
        return self.n_parts >= len(self._stops)

    def refresh(self) -> None:
        pass

    def index(self) -> ExampleIndex:
        stops = self._stops[: self.n_parts]
        found = index_of(self._examples[: stops[-1] if stops else 0])
        return replace(found, first_example=np.array([0, *stops], np.int64))


@given(EXAMPLES.filter(len), HEIGHTS, st.integers(1, 30), st.data())
def test_what_grows_is_the_same_whenever_it_is_looked_at(
    examples: list[tuple[int, int]], height: int, batch_tokens: int, data: st.DataObject
) -> None:
    stops = sorted({*data.draw(st.lists(st.integers(1, len(examples)), max_size=4)), len(examples)})
    whole = schedule(examples, height, batch_tokens)
    found: list[list[range]] = []
    batches: list[Batches] = []
    for early in (True, False):
        table = GrowingTable(examples, stops, 0 if early else len(stops))
        growing = GrowingSchedule(
            cast("ExampleTable", table), table.is_whole, rows_per_shard=height, batch_tokens=batch_tokens
        )
        runs, ran = [], Batches()
        for shards in growing.intervals():
            if shards is None:
                table.n_parts += 1
                continue
            assert shards.stop <= growing.n_shards
            runs += growing.runs(2, shards)
            for shard in shards:
                ran += [(batch.group, tuple(batch.examples.tolist())) for batch in growing.batches(shard)]
        found.append(runs)
        batches.append(ran)
        assert (growing.is_whole, growing.n_rows, growing.n_shards) == (True, whole.n_rows, whole.n_shards)
    assert found[0] == found[1]
    assert [shard for run in found[0] for shard in run] == list(range(whole.n_shards))
    assert batches[0] == batches[1] == batches_of(whole, set())
