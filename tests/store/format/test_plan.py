"""The plan: unchanged by JSON, strict about its values, and able to say how two plans differ."""

import json
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from residua.store.base.errors import PlanError, UnknownSiteError, UnsafeArchiveError
from residua.store.base.untrusted import MAX_ROWS
from residua.store.format.plan import (
    CHUNK_BYTES,
    COLUMN_BYTES,
    SHARD_BYTES,
    Plan,
    SitePlan,
    choose_rows_per_chunk,
    choose_rows_per_shard,
    host_buffer_bytes,
    n_open_shards,
    nearest_power_of_two,
)
from residua.store.format.row_columns import ROW_COLUMNS
from tests.store.base.test_canonical import TEXTS, VALUES

SITES = (
    SitePlan(name="resid_post.0", row_shape=(64,), dtype="bfloat16", codec="fast"),
    SitePlan(name="q.1", row_shape=(4, 16), dtype="float32", codec="bitround7"),
    SitePlan(name="module:model.norm@output", row_shape=(65,), dtype="float16", codec="int8-block32"),
    SitePlan(name="logits_top8.indices", row_shape=(8,), dtype="int32", codec="raw"),
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=3)


def make_plan(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "model": {"class": "LlamaForCausalLM", "weights": "ab" * 32},
        "dataset": {"digest": "cd" * 32, "n_examples": 3},
        "rules": {"positions": "all", "max_length": None},
        "sites": SITES,
        "rows_per_shard": 1024,
        "batch_tokens": 8192,
        "n_rows": 5000,
    }
    return Plan(**{**fields, **changes})


PLANS = st.builds(
    make_plan,
    model=OBJECTS,
    dataset=OBJECTS,
    rules=OBJECTS,
    sites=st.lists(st.sampled_from(SITES), min_size=1, unique=True).map(tuple),
    rows_per_shard=st.integers(0, 20).map(lambda power: 2**power),
    batch_tokens=st.integers(0, MAX_ROWS),
    padding=st.sampled_from(["left", "right"]),
    n_rows=st.none() | st.integers(0, MAX_ROWS),
)


@given(PLANS)
def test_a_plan_comes_back_through_json(plan: Plan) -> None:
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.digest == plan.digest
    assert plan.differences(again) == []


@given(PLANS, PLANS)
def test_plans_of_other_digests_differ_in_words_and_only_they(mine: Plan, theirs: Plan) -> None:
    assert bool(mine.differences(theirs)) == (mine.digest != theirs.digest)


def paths_into(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [path, *(deeper for key, item in items for deeper in paths_into(item, (*path, key)))]


NUMBERS: list[object] = [-1, 0, 3, 1.5, 2**31, 2**70, 1e300, float("nan"), True, None]
WORDS: list[object] = ["", "x", "../../etc", "\ud800", "resid_post.00", "module:a", "int8", "auto", "a" * 5000]
NESTED: list[object] = [[], {}, [[]], [0], [-4], [1.5], [2**31, 2**31], [1] * 9, {"name": "embed"}]
HOSTILE = st.sampled_from([*NUMBERS, *WORDS, *NESTED]).map(deepcopy)


@given(st.data())
def test_a_mutated_plan_is_refused_or_is_a_plan(data: st.DataObject) -> None:
    document = json.loads(json.dumps(make_plan().to_json()))
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(paths_into(document)[1:]))
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        action = data.draw(st.sampled_from(["set", "drop", "add"]))
        if action == "set":
            parent[path[-1]] = data.draw(HOSTILE | VALUES)
        elif action == "drop":
            del parent[path[-1]]
        elif isinstance(parent, dict):
            parent[data.draw(TEXTS)] = data.draw(HOSTILE)
        else:
            parent.append(data.draw(HOSTILE))
    try:
        plan = Plan.from_json(document)
    except UnsafeArchiveError:
        return
    assert json.loads(json.dumps(plan.to_json())) == document
    assert all(spec.path.startswith(("sites/", "scales/", "rows/")) and ".." not in spec.path for spec in plan.arrays)


@given(VALUES)
def test_other_json_is_no_plan(value: object) -> None:
    with pytest.raises(UnsafeArchiveError, match="plan"):
        Plan.from_json(value)


def test_endless_nesting_is_refused() -> None:
    document: Any = make_plan().to_json()
    for _ in range(100_000):
        document["rules"] = {"deeper": document["rules"]}
    with pytest.raises(UnsafeArchiveError, match="recursion"):
        Plan.from_json(document)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows_per_shard": 1000}, "rows per shard: 1,000"),
        ({"rows_per_shard": 0}, "rows per shard: 0"),
        ({"rows_per_shard": 1024.0}, "1024.0"),
        ({"rows_per_shard": True}, "True"),
        ({"rows_per_shard": 2**32}, str(2**32)),
        ({"n_rows": -1}, "-1"),
        ({"n_rows": MAX_ROWS + 1}, str(MAX_ROWS + 1)),
        ({"batch_tokens": -5}, "-5"),
        ({"padding": "centre"}, "centre"),
        ({"rules": None}, "rules"),
        ({"sites": ()}, "at least one"),
        ({"sites": (SITES[0], SITES[0])}, "once"),
    ],
)
def test_a_plan_that_no_archive_could_have_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(**changes)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"row_shape": ()}, "shape of a row"),
        ({"row_shape": (0,)}, "shape of a row"),
        ({"row_shape": (True,)}, "shape of a row"),
        ({"row_shape": (2,) * 5}, "shape of a row"),
        ({"row_shape": (2**20, 2**20)}, "64 GiB"),
        ({"dtype": "complex64"}, "complex64"),
        ({"codec": "zip"}, "zip"),
        ({"codec": "bitround7"}, "float32"),
        ({"codec": "int8-block32", "dtype": "int32"}, "not for int32"),
        ({"name": "module:model.norm"}, "module:model.norm@output"),
    ],
)
def test_a_site_that_could_not_be_stored_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(sites=(replace(SITES[0], **changes),))
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["resid_post", "resid_post.-1", "../x", "module:a/b", ""])
def test_a_name_that_is_no_site_is_refused(name: str) -> None:
    with pytest.raises(UnknownSiteError):
        make_plan(sites=(replace(SITES[0], name=name),))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rows_per_shard": 2048}, "rows_per_shard: the archive has 1024, this run has 2048"),
        ({"padding": "left"}, 'padding: the archive has "right", this run has "left"'),
        ({"n_rows": None}, "n_rows: the archive has 5000, this run has null"),
        (
            {"model": {"class": "LlamaForCausalLM"}},
            f'model.weights: the archive has "{"ab" * 32}", this run has nothing',
        ),
        ({"rules": {"positions": "all"}}, "rules.max_length: the archive has null, this run has nothing"),
        (
            {"rules": {"positions": "all", "max_length": False}},
            "rules.max_length: the archive has null, this run has false",
        ),
        ({"sites": SITES[:3]}, "sites.logits_top8.indices: "),
        ({"sites": (replace(SITES[0], codec="raw"), *SITES[1:])}, "sites.resid_post.0: "),
        ({"sites": SITES[::-1]}, "sites: the archive has them in the order resid_post.0, q.1, "),
    ],
)
def test_a_difference_names_the_field_and_both_values(changes: dict[str, Any], line: str) -> None:
    (found,) = make_plan().differences(make_plan(**changes))
    assert found.startswith(line)


def test_every_field_is_part_of_the_digest() -> None:
    changes: list[dict[str, Any]] = [
        {"model": {}},
        {"dataset": {}},
        {"rules": {}},
        {"sites": SITES[:1]},
        {"rows_per_shard": 1},
        {"batch_tokens": 1},
        {"padding": "left"},
        {"n_rows": None},
    ]
    assert len({make_plan().digest, *(make_plan(**change).digest for change in changes)}) == 1 + len(changes)
    assert {key for change in changes for key in change} == make_plan().to_json().keys()


def test_arrays_follow_from_the_sites() -> None:
    plan = make_plan()
    shapes = {spec.path: (spec.row_shape, spec.dtype, spec.preset) for spec in plan.arrays}
    assert shapes == {
        "sites/resid_post/0": ((64,), "bfloat16", "fast"),
        "sites/q/1": ((4, 16), "float32", "bitround7"),
        "sites/module/model.norm@output": ((65,), "int8", "fast"),
        "scales/module/model.norm@output": ((3,), "float32", "fast"),
        "sites/logits_top8/indices": ((8,), "int32", "raw"),
        **{f"rows/{name}": ((), dtype, "fast") for name, dtype in ROW_COLUMNS.items()},
    }
    assert all(spec.rows_per_shard == 1024 for spec in plan.arrays)
    assert plan.site("q.1") == SITES[1]
    with pytest.raises(KeyError):
        plan.site("q.2")
    assert [plan.n_shards(n) for n in (0, 1, 1024, 1025)] == [0, 1, 1, 2]


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
    rows = choose_rows_per_chunk(row_bytes, height)
    assert is_power_of_two(rows)
    assert height % rows == 0
    if 1 < rows < height:
        assert CHUNK_BYTES / 1.5 <= rows * row_bytes <= CHUNK_BYTES * 4 / 3


@given(st.integers(1, 500), HEIGHTS, st.integers(0, 2**20))
def test_every_shard_that_an_example_can_reach_may_be_open(most_rows: int, height: int, start: int) -> None:
    touched = {row // height for row in (start, start + most_rows - 1)}
    assert n_open_shards(most_rows, height) >= max(touched) - min(touched) + 1
    assert n_open_shards(most_rows, height) >= 2, "one fills while another is written"


@given(WIDTHS, st.integers(1, 10**5), st.integers(0, 5000), st.integers(2**20, 2**34))
def test_the_budget_holds_and_the_answer_is_always_the_same(
    widths: list[int], batch_rows: int, most_rows: int, budget: int
) -> None:
    def ask(sizes: list[int]) -> int:
        return choose_rows_per_shard(
            sizes, batch_rows=batch_rows, most_rows_per_example=most_rows, host_memory_bytes=budget
        )

    if host_buffer_bytes(sum(widths), most_rows, 1) > budget:
        with pytest.raises(PlanError, match=f"{budget:,} bytes"):
            ask(widths)
        return
    height = ask(widths)
    assert is_power_of_two(height)
    assert ask(widths[::-1]) == height, "only the widest site and the sum count"
    held = n_open_shards(most_rows, height) * height * (sum(widths) + COLUMN_BYTES)
    assert held <= budget
    ideal = max(nearest_power_of_two(SHARD_BYTES / max(widths)), 1 << (batch_rows - 1).bit_length())
    assert height <= ideal
    assert height == ideal or host_buffer_bytes(sum(widths), most_rows, 2 * height) > budget


@given(WIDTHS, st.integers(1, 10**5), st.integers(0, 5000))
def test_more_memory_never_makes_shards_shorter(widths: list[int], batch_rows: int, most_rows: int) -> None:
    heights = []
    for power in range(20, 36):
        try:
            heights.append(
                choose_rows_per_shard(
                    widths, batch_rows=batch_rows, most_rows_per_example=most_rows, host_memory_bytes=2**power
                )
            )
        except PlanError:
            assert not heights, "what fits less memory fits more"
    assert all(small <= large for small, large in pairwise(heights))


def test_a_shard_holds_a_full_batch_where_memory_allows() -> None:
    assert choose_rows_per_shard([2**20], batch_rows=1, most_rows_per_example=10) == 32
    assert choose_rows_per_shard([2**20], batch_rows=33, most_rows_per_example=10) == 64
