"""Draw how costs grow with size, from measurements: `python scripts/scale_picture.py`.

The script reads the tables in `benchmarks/results` and writes `docs/scale.svg`, or the file that you name; the suffix
of the name sets the format.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot as plt  # after the choice of the backend
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "scale.svg"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
MARKERS = "osD^vPX"


class Line(NamedTuple):
    """One curve: its name, and its points."""

    name: str
    sizes: Sequence[float]
    values: Sequence[float]


def rows_of(report: str, heading: str) -> list[list[str]]:
    """Return the cells of the table in a report whose first heading begins with `heading`, its own line first."""
    lines = (ROOT / "benchmarks" / "results" / f"{report}.md").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"| {heading}"))
    table = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return [table[0], *table[2:]]


def number(text: str) -> float:
    """Return the number that a cell begins or ends with."""
    return float(re.findall(r"[\d,.]+", text)[-1].replace(",", ""))


def opening() -> list[Line]:
    """Return what opening costs, from the index and from the records, by shards."""
    table = rows_of("opening", "shards")[1:]
    named = {"index": "from the packed index", "records": "from the records"}
    lines = []
    for way, name in named.items():
        found = [row for row in table if row[1] == way]
        lines.append(Line(name, [number(row[0]) for row in found], [number(row[3]) / 1000 for row in found]))
    return lines


def beginning() -> list[Line]:
    """Return what is computed before the first batch is done, by tokens of the dataset."""
    table = rows_of("beginning", "tokens")[1:]
    lines = []
    for what in ("token ids", "texts"):
        for plan, name in (("whole", "dataset read first"), ("grow", "--grow")):
            found = [row for row in table if row[0].startswith(what) and row[2] == plan]
            lines.append(Line(f"{what}, {name}", [number(row[0]) for row in found], [number(row[5]) for row in found]))
    return lines


def memory() -> tuple[list[Line], list[Line]]:
    """Return processor time and memory of each kind of work, by rows."""
    head, *table = rows_of("memory", "MiB")
    places = [place for place, name in enumerate(head) if name.endswith(" rows")]
    sizes = [number(head[place]) for place in places]
    times, peaks = [], []
    for row in table:
        seconds = [float(part) for part in row[-1].split("/")]
        found = [(size, value) for size, value in zip(sizes, seconds, strict=True) if value]  # not rounded to nothing
        times.append(Line(row[0], *zip(*found, strict=True)))
        peaks.append(Line(row[0], sizes, [number(row[place]) for place in places]))
    return times, peaks


def panel(axes: Axes, title: str, x: str, y: str, lines: Sequence[Line]) -> None:
    """Draw curves over sizes on a logarithmic axis."""
    for line, colour, marker in zip(lines, COLOURS[: len(lines)], MARKERS[: len(lines)], strict=True):
        axes.plot(line.sizes, line.values, color=colour, marker=marker, markersize=5, linewidth=1.6, label=line.name)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(which="major", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, labelspacing=0.3)


def seconds(axes: Axes, title: str, x: str, lines: Sequence[Line]) -> None:
    """Draw processor time, on logarithmic axes."""
    panel(axes, title, x, "CPU seconds", lines)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def guide(axes: Axes, sizes: Sequence[float], start: float) -> None:
    """Draw the slope of what grows as the size does."""
    end = start * sizes[-1] / sizes[0]
    axes.plot([sizes[0], sizes[-1]], [start, end], color="#999999", linewidth=1, linestyle=":")
    axes.annotate("as the rows", (sizes[-1], end), (-66, -3), textcoords="offset points", color="#777777", fontsize=8)


def draw(out: Path) -> None:
    """Draw four panels."""
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 7.6), layout="constrained")
    times, peaks = memory()
    seconds(axes[0, 0], "Opening a finished archive", "shards of 36 arrays", opening())
    seconds(axes[0, 1], "Until the first batch is done", "tokens of the dataset", beginning())
    axes[0, 1].set(xlim=(9e6, 1.3e8), ylim=(1, 100))
    seconds(axes[1, 0], "Work over all rows", "rows of width 128", times)
    guide(axes[1, 0], times[0].sizes, 2 * max(line.values[0] for line in times))
    panel(axes[1, 1], "Memory that work adds at its peak", "rows of width 128", "MiB", peaks)
    axes[1, 1].set_ylim(0, 250)
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "scale"})
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
