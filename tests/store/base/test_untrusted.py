"""The checks of untrusted input: sizes, names, shapes, files and texts."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from residua.store.base.errors import DamagedArchiveError, UnsafeArchiveError
from residua.store.base.untrusted import (
    is_finite,
    is_inside,
    name_problem,
    parse_json,
    parse_yaml,
    read_file,
    shape_problem,
    size_problem,
)


@given(st.integers(-20, 20), st.integers(-5, 5), st.integers(-5, 5))
def test_a_size_is_an_integer_within_its_limits(value: int, least: int, most: int) -> None:
    assert (size_problem("rows", value, most, least) == "") == (least <= value <= most)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [1], float("nan")])
def test_other_values_are_no_sizes(value: object) -> None:
    found = size_problem("rows of a shard", value, 9)
    assert "rows of a shard" in found
    assert repr(value) in found
    assert len(size_problem("rows", "x" * 10**6, 9)) < 200


@pytest.mark.parametrize("value", [[], [1] * 4, [1, 0], [1, 10], [1, True], [1, 2.0], "12", 3, None, {1: 2}])
def test_shapes_out_of_limits_are_refused(value: object) -> None:
    assert shape_problem("shape", [1, 9], max_rank=3, most=9, least=1) == ""
    assert "shape" in shape_problem("shape", value, max_rank=3, most=9, least=1)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc", "a/../b", "a//b", "a/", "./a", "a/\0", "a/\n"])
def test_names_that_leave_a_folder_are_refused(name: str) -> None:
    assert name_problem("a/b.c") == ""
    assert repr(name) in name_problem(name)


@pytest.mark.parametrize(("value", "expected"), [(0.5, True), (2**53 - 1, True), (2**53, False), (10**400, False)])
def test_finite_numbers(value: float, expected: bool) -> None:
    assert is_finite(value) == is_finite(-value) == expected
    assert not any(map(is_finite, [True, None, "1", float("nan"), float("inf")]))


def test_links_and_impossible_names_are_outside(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    assert is_inside(tmp_path / "in", tmp_path / "in" / "missing")
    assert not is_inside(tmp_path / "in", tmp_path / "in" / "link" / "x")
    assert not is_inside(tmp_path / "in", tmp_path / "in" / "missing" / ".." / ".." / "x")
    assert not is_inside(tmp_path / "in", tmp_path / "in" / "a\0")
    assert not is_inside(tmp_path / "in", tmp_path / "inner")
    (tmp_path / "in" / "a").mkdir()
    (tmp_path / "in" / "b").symlink_to("a")
    assert is_inside(tmp_path / "in", tmp_path / "in" / "b" / "x")
    assert is_inside(tmp_path / "in" / "link" / "in", tmp_path / "in" / "link" / "in" / "x")
    (tmp_path / "in" / "a" / "out").symlink_to(tmp_path / "inner")
    assert not is_inside(tmp_path / "in", tmp_path / "in" / "a" / "out" / "missing")


def test_a_file_is_read_within_its_limit_only(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(DamagedArchiveError, match=r"a\.json is missing"):
        read_file(tmp_path, path, 2**20)
    path.write_bytes(b"x")
    assert read_file(tmp_path, path, 2**20) == b"x"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UnsafeArchiveError, match=r"a\.json.*1,099,511,627,776 bytes.*1 MiB"):
        read_file(tmp_path, path, 2**20)


@given(st.text(max_size=30) | st.sampled_from(["[" * 10**5, "{a: *a}", "&a [*a]", "!!int ''", "!!python/none x"]))
def test_texts_give_a_value_or_a_value_error(text: str) -> None:
    for parse in (parse_json, parse_yaml):
        try:
            parse(text)
        except ValueError:
            continue
    assert parse_json("[1]") == parse_yaml("[1]") == [1]


@pytest.mark.parametrize("text", ["{a: *a}", "&a [*a]", "a: &x 1\nb: *x"])
def test_references_in_yaml_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"reference|alias"):
        parse_yaml(text)
