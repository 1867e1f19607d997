"""The plan: the same through JSON, strict about what it is made of, and able to say how two of them differ."""

import json
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from residua.store.base.errors import PlanError, UnknownSiteError, UnsafeArchiveError
from residua.store.encoding.spec import MAX_ROWS
from residua.store.format.plan import ROW_COLUMNS, Plan, SitePlan
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


def test_nesting_without_a_bottom_is_refused() -> None:
    document: Any = make_plan().to_json()
    for _ in range(100_000):
        document["rules"] = {"deeper": document["rules"]}
    with pytest.raises(UnsafeArchiveError, match="recursion"):
        Plan.from_json(document)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows_per_shard": 1000}, "rows per shard is 1000"),
        ({"rows_per_shard": 0}, "rows per shard is 0"),
        ({"rows_per_shard": 1024.0}, "1024.0"),
        ({"rows_per_shard": True}, "True"),
        ({"rows_per_shard": 2**32}, "power of two"),
        ({"n_rows": -1}, "-1"),
        ({"n_rows": MAX_ROWS + 1}, "2**48"),
        ({"batch_tokens": -5}, "-5"),
        ({"padding": "centre"}, "centre"),
        ({"rules": None}, "rules"),
        ({"sites": ()}, "at least one"),
        ({"sites": (SITES[0], SITES[0])}, "each once"),
    ],
)
def test_a_plan_that_no_archive_could_have_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(**changes)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"row_shape": ()}, "not the shape of a row"),
        ({"row_shape": (0,)}, "not the shape of a row"),
        ({"row_shape": (True,)}, "not the shape of a row"),
        ({"row_shape": (2,) * 5}, "not the shape of a row"),
        ({"row_shape": (2**20, 2**20)}, "64 GiB"),
        ({"dtype": "complex64"}, "complex64"),
        ({"codec": "zip"}, "zip"),
        ({"codec": "bitround7"}, "float32"),
        ({"codec": "int8-block32", "dtype": "int32"}, "floating point"),
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
