"""From what the ranks report of their shards to the layout, or to a refusal: every way to split, no processes."""

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from residua.capture.hooks.site import SiteInfo
from residua.capture.layout.layouts import Layout, Shape, ShardReport, full_shape, infer_layout

ROOT = Path(__file__).parents[3]
SIZES = st.lists(st.integers(1, 9), min_size=2, max_size=5)


def reported(*shapes: tuple[int, ...], checksums: list[int] | None = None) -> list[ShardReport]:
    checksums = checksums or list(range(len(shapes)))
    return [
        ShardReport(i, shape, "float32", checksum)
        for i, (shape, checksum) in enumerate(zip(shapes, checksums, strict=True))
    ]


@given(SIZES, st.integers(1, 3))
def test_a_tensor_split_along_one_axis_evenly_or_not_has_that_layout(sizes: list[int], dim: int) -> None:
    full = [2, 7, 11, 13]
    full[dim] = sum(sizes)
    shapes = [(*full[:dim], size, *full[dim + 1 :]) for size in sizes]
    assert infer_layout(reported(*shapes), tuple(full)) == Layout(dim, tuple(sizes))


@given(SIZES)
def test_shards_that_do_not_add_up_are_refused(sizes: list[int]) -> None:
    shapes = [(2, 7, size) for size in sizes]
    assert isinstance(infer_layout(reported(*shapes), (2, 7, sum(sizes) + 1)), str)


def test_equal_tensors_are_replicas_and_unequal_ones_are_refused() -> None:
    same = reported((2, 7, 5), (2, 7, 5), checksums=[4, 4])
    assert infer_layout(same, (2, 7, 5)) == Layout()
    assert infer_layout(same, None) == Layout()
    for full in ((2, 7, 5), None):
        found = infer_layout(reported((2, 7, 5), (2, 7, 5)), full)
        assert isinstance(found, str)
        assert "not yet added up" in found


def test_fewer_positions_than_the_call_has_are_accepted() -> None:
    """Logits of the last position only, and keys of a cache before those of the call."""
    assert infer_layout(reported((2, 1, 5), (2, 1, 5), checksums=[4, 4]), (2, 7, 5)) == Layout()
    assert infer_layout(reported((2, 9, 2, 3), (2, 9, 2, 3)), (2, 1, 4, 3)) == Layout(2, (2, 2))


@pytest.mark.parametrize(
    ("shapes", "full"),
    [
        ([(2, 7, 5), (2, 7)], (2, 7, 5)),
        ([(2, 3, 2), (2, 4, 3)], (2, 7, 5)),
        ([(2, 7, 5), (2, 7, 5)], (2, 7, 5, 1)),
        ([(2, 7, 4), (2, 7, 4)], (2, 7, 5)),
        ([(2, 7, 2), (2, 7, 3)], None),
    ],
)
def test_reports_that_prove_no_layout_are_refused(shapes: list[tuple[int, ...]], full: tuple[int, ...] | None) -> None:
    assert isinstance(infer_layout(reported(*shapes), full), str)


def test_types_that_differ_are_refused() -> None:
    reports = [ShardReport(0, (2, 7, 5), "float32", 1), ShardReport(1, (2, 7, 5), "bfloat16", 1)]
    assert isinstance(infer_layout(reports, (2, 7, 5)), str)


def test_the_full_shape_takes_what_only_the_run_knows_from_the_run() -> None:
    pattern = SiteInfo(name="pattern.0", row_shape=(8, None), dtype="float32", module="b", via="attention")
    assert full_shape(pattern, (2, 7), (2, 7, 4, 9)) == (2, 7, 8, 9)
    assert full_shape(pattern, None, (2, 7, 4, 9)) is None
    assert full_shape(pattern, (2, 7), (2, 7, 4)) is None


@pytest.mark.parametrize(
    ("found", "full", "layout"),
    [
        ([((4, 6), 1), ((4, 6), 1)], (4, 6), Layout()),
        ([((4, 6), 1), ((4, 6), 1)], None, Layout()),
        ([((2, 6), 1), ((2, 6), 2)], (4, 6), Layout(0, (2, 2))),
        ([((2, 6), 1), ((2, 6), 1)], (4, 6), Layout(0, (2, 2))),  # shards of equal values, such as zeros
        ([((3,), 0), ((1,), 0)], (4,), Layout(0, (3, 1))),
        ([((4, 2), 1), ((4, 2), 2), ((4, 1), 3)], (4, 5), Layout(1, (2, 2, 1))),
        ([((4, 6), 1), ((4, 6), 2)], (4, 6), None),  # every rank has other values: these are no shards of one tensor
        ([((4, 6), 1), ((4, 6), 2)], None, None),
        ([((2, 6), 1), ((4, 3), 2)], (4, 6), None),
        ([((2, 6), 1), ((3, 6), 2)], (4, 6), None),
        ([((12,), 1), ((12,), 2)], (4, 6), None),
    ],
)
def test_parameters_have_no_free_axes(
    found: list[tuple[Shape, int]], full: Shape | None, layout: Layout | None
) -> None:
    reports = [ShardReport(rank, shape, "torch.float32", crc) for rank, (shape, crc) in enumerate(found)]
    inferred = infer_layout(reports, full, n_free_axes=0)
    assert inferred == layout if layout else isinstance(inferred, str)


def test_the_docs_show_the_measured_table() -> None:
    spec = importlib.util.spec_from_file_location("layouts_table", ROOT / "scripts" / "layouts_table.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    table = script.table(json.loads((ROOT / "docs" / "layouts.json").read_text()))
    assert table in (ROOT / "docs" / "distributed.md").read_text(), "run scripts/layouts_table.py --render"
