"""Draw how an activation moves from hook to shard in each layout: `python scripts/layouts_picture.py`.

The script writes `docs/layouts.svg`, or the file that you name; the suffix of the name sets the format.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot as plt  # after the choice of the backend
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

OUT = Path(__file__).parents[1] / "docs" / "layouts.svg"
COLUMNS = ("hook", "between ranks", "copy", "encode, write", "archive")
AT = (1.5, 4.25, 7.0, 9.75, 12.5)
WIDTH, HEIGHT, STEP = 2.15, 0.62, 0.86
FULL, SHARDED, NOTHING, HOST, DISK = "#cfe3f5", "#f7dfb5", "#eeeeee", "#d9ead3", "#e3d7ee"


@dataclass(frozen=True)
class Lane:
    """A site's tensor on one rank: the texts of its boxes, one a column, and the lane that it is sent to, if any."""

    rank: str
    texts: tuple[str, str, str, str, str]
    is_sharded: bool = False
    sends_to: int | None = None


@dataclass(frozen=True)
class Layout:
    """One panel: a layout with a lane for each rank."""

    title: str
    lanes: Sequence[Lane]


COPY, WRITE = "wanted rows into a\npinned host buffer", "writer thread"
ALL = [
    Layout(
        "Replicas: one process each; DDP, FSDP, ZeRO-3. Nothing is sent; each writes its own shards",
        [
            Lane("worker 0", ("full, its batch", "", COPY, WRITE, "shards 0-2")),
            Lane("worker 1", ("full, its batch", "", COPY, WRITE, "shards 3-5")),
        ],
    ),
    Layout(
        "Tensor parallel, an unsharded site (resid_post.7): the rank whose turn it is stores it",
        [
            Lane("rank 0", ("full", "", COPY, WRITE, "resid_post.7,\nshard 0")),
            Lane("rank 1", ("full", "not its turn", "", "", "")),
        ],
    ),
    Layout(
        "Tensor parallel, a sharded site (q.3): one all_to_all to the rank whose turn it is",
        [
            Lane("rank 0", ("heads 0-3", "its columns of\nwanted rows", "", "", ""), is_sharded=True, sends_to=1),
            Lane("rank 1", ("heads 4-7", "columns to rows", COPY, WRITE, "q.3, shard 0"), is_sharded=True),
        ],
    ),
    Layout(
        "Pipeline: the stage that has a site writes it",
        [
            Lane("stage 0", ("blocks 0-3: full", "", COPY, WRITE, "resid_post.2,\nshard 0")),
            Lane("stage 1", ("blocks 4-7: full", "", COPY, WRITE, "resid_post.6,\nshard 0")),
        ],
    ),
]


def box(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    """Draw a box around a text."""
    corner = (x - WIDTH / 2, y - HEIGHT / 2)
    axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle="round,pad=0.02", fc=color, ec="#555555", lw=0.8))
    axes.text(x, y, text, ha="center", va="center", fontsize=8)


def arrow(axes: Axes, start: tuple[float, float], stop: tuple[float, float]) -> None:
    """Draw an arrow."""
    axes.add_patch(FancyArrowPatch(start, stop, arrowstyle="-|>", mutation_scale=9, lw=1, color="#333333"))


def lane(axes: Axes, drawn: Lane, y: float) -> None:
    """Draw the boxes of one rank, and arrows between them."""
    axes.text(0.28, y, drawn.rank, ha="right", va="center", fontsize=8)
    sent = NOTHING if drawn.texts[1] == "not its turn" else SHARDED if drawn.sends_to is not None else FULL
    colors = (SHARDED if drawn.is_sharded else FULL, sent, HOST, HOST, DISK)
    last = None
    for x, text, color in zip(AT, drawn.texts, colors, strict=True):
        if not text:
            continue
        box(axes, x, y, text, color)
        if last is not None:
            arrow(axes, (last + WIDTH / 2 + 0.03, y), (x - WIDTH / 2 - 0.03, y))
        last = x
    if drawn.sends_to is not None:
        arrow(axes, (AT[1], y - HEIGHT / 2 - 0.03), (AT[1], y - STEP + HEIGHT / 2 + 0.03))


def draw(out: Path) -> None:
    """Draw all layouts, one below the other."""
    height = sum(len(layout.lanes) * STEP + 0.75 for layout in ALL) + 0.6
    figure, axes = plt.subplots(figsize=(10.5, height * 0.72))
    y = height - 0.35
    for x, text in zip(AT, COLUMNS, strict=True):
        axes.text(x, y, text, ha="center", va="center", fontsize=9, fontweight="bold")
    for layout in ALL:
        y -= 0.75
        axes.text(-0.7, y + 0.05, layout.title, ha="left", va="center", fontsize=9, style="italic")
        for drawn in layout.lanes:
            y -= STEP if drawn is not layout.lanes[0] else 0.62
            lane(axes, drawn, y)
        y -= STEP - 0.62
    axes.set_xlim(-0.75, AT[-1] + WIDTH / 2 + 0.1)
    axes.set_ylim(y - HEIGHT, height)
    axes.axis("off")
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "layouts"})
    figure.savefig(out, bbox_inches="tight", metadata={"Date": None} if out.suffix == ".svg" else None, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
