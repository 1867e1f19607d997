"""How weights that are split by hand lie is told from shapes and checksums alone, or not at all."""

import pytest

from residua.capture.layout.layouts import Layout, Shape, ShardReport
from residua.capture.layout.parameters import infer_layout


def parts(*said: tuple[Shape, int]) -> list[ShardReport]:
    return [ShardReport(rank, shape, "torch.float32", checksum) for rank, (shape, checksum) in enumerate(said)]


@pytest.mark.parametrize(
    ("said", "whole", "layout"),
    [
        ([((4, 6), 1), ((4, 6), 1)], (4, 6), Layout()),
        ([((4, 6), 1), ((4, 6), 1)], None, Layout()),
        ([((2, 6), 1), ((2, 6), 2)], (4, 6), Layout(0, (2, 2))),
        ([((2, 6), 1), ((2, 6), 1)], (4, 6), Layout(0, (2, 2))),  # equal parts, such as zeros, are parts all the same
        ([((3,), 0), ((1,), 0)], (4,), Layout(0, (3, 1))),
        ([((4, 2), 1), ((4, 2), 2), ((4, 1), 3)], (4, 5), Layout(1, (2, 2, 1))),
        ([((4, 6), 1), ((4, 6), 2)], (4, 6), None),  # every rank something else: no part of this whole
        ([((4, 6), 1), ((4, 6), 2)], None, None),
        ([((2, 6), 1), ((4, 3), 2)], (4, 6), None),
        ([((2, 6), 1), ((3, 6), 2)], (4, 6), None),
        ([((12,), 1), ((12,), 2)], (4, 6), None),
    ],
)
def test_parts_and_copies(said: list[tuple[Shape, int]], whole: Shape | None, layout: Layout | None) -> None:
    assert infer_layout(parts(*said), whole) == layout
