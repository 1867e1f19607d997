"""The pictures that analyses make: lines over layers or positions, and heat maps of heads. Written as PNG or SVG.

Figures are made without a display and without matplotlib's global state, so that tasks and threads may draw at once.
"""

from collections.abc import Mapping, Sequence
from os import PathLike

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, MaxNLocator

_DPI = 150
_MOST_TICKS = 24  # labels beyond it would touch each other
_MOST_INSIDE = 3  # entries of a legend that leave room for the lines
_MOST_UPRIGHT = 7  # names of sites that stand side by side
_MOST_CELLS_WITH_NUMBERS = 120
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito, 2008


def line_plot(
    path: str | PathLike[str],
    x: Sequence[float] | Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    title: str,
    x_name: str,
    y_name: str,
    log_y: bool = False,
) -> None:
    """Draw one line for each of `series` over `x`, told apart by colour and marker, and write the picture.

    Args:
        path: The file to write; its ending says the format.
        x: Places on the axis: numbers, or names in order.
        series: Values by the name in the legend; NaN leaves a gap.
        title: Title of the picture.
        x_name: Name of the x axis, with its unit if it has one.
        y_name: Name of the y axis, with its unit.
        log_y: Whether the y axis is logarithmic.
    """
    figure, axes = _figure(7.0, 4.2)
    for number, (name, values) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        marker = "os^Dv<>"[number % 7] if len(values) <= _MOST_TICKS else None
        axes.plot(x, values, label=name, color=colour, marker=marker, markersize=4, linewidth=1.6)
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter("{x:g}")
    if isinstance(next(iter(x), ""), str):
        axes.set_xticks(*_ticks(len(x), [str(name) for name in x]), rotation=90 if len(x) > _MOST_UPRIGHT else 0)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=all(float(place).is_integer() for place in x)))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > _MOST_INSIDE:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        axes.legend(frameon=False)
    _finish(figure, axes, path, title, x_name, y_name)


def heat_map(
    path: str | PathLike[str],
    values: npt.ArrayLike,
    *,
    title: str,
    x_name: str,
    y_name: str,
    value_name: str,
    x_ticks: Sequence[str] | None = None,
    y_ticks: Sequence[str] | None = None,
    centred: bool = False,
) -> None:
    """Draw a matrix as coloured cells, the first row at the top, and write the picture.

    Args:
        path: The file to write; its ending says the format.
        values: (rows, columns) numbers; NaN stays white.
        title: Title of the picture.
        x_name: Name of the columns' axis.
        y_name: Name of the rows' axis.
        value_name: What a colour means, with its unit.
        x_ticks: Names of the columns; their numbers if None.
        y_ticks: Names of the rows; their numbers if None.
        centred: Whether zero is the middle of two colours, for values of either sign.
    """
    cells = np.asarray(values, np.float64)
    n_rows, n_columns = cells.shape
    figure, axes = _figure(min(14.0, 3.0 + 0.45 * n_columns), min(12.0, 1.8 + 0.38 * n_rows))
    finite = np.abs(cells[np.isfinite(cells)])
    most = float(finite.max()) if finite.size else 1.0
    colours = "RdBu_r" if centred else "viridis"
    image = axes.imshow(
        cells, cmap=colours, aspect="auto", vmin=-most if centred else None, vmax=most if centred else None
    )
    figure.colorbar(image, ax=axes, label=value_name)
    axes.set_xticks(*_ticks(n_columns, x_ticks), rotation=90 if x_ticks and max(map(len, x_ticks)) > 3 else 0)
    axes.set_yticks(*_ticks(n_rows, y_ticks))
    if cells.size <= _MOST_CELLS_WITH_NUMBERS:
        _write_numbers(axes, cells, image, centred=centred)
    _finish(figure, axes, path, title, x_name, y_name)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _finish(figure: Figure, axes: Axes, path: str | PathLike[str], title: str, x_name: str, y_name: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name)
    figure.savefig(path)


def _ticks(count: int, names: Sequence[str] | None) -> tuple[list[int], list[str]]:
    """Return the places to label, every so many of `count`, and their labels."""
    places = list(range(0, count, -(-count // _MOST_TICKS)))
    return places, [str(place) if names is None else names[place] for place in places]


def _write_numbers(axes: Axes, cells: npt.NDArray[np.float64], image: AxesImage, *, centred: bool) -> None:
    """Write each value into its cell, in black or white, whichever can be read."""
    shades = np.ma.filled(image.norm(cells), 0.0)
    form = ".2f" if 0.1 <= np.nanmax(np.abs(cells), initial=0.0) < 100 else ".2g"
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            shade = shades[row, column]
            dark = abs(shade - 0.5) > 0.35 if centred else shade < 0.6
            axes.text(
                column, row, f"{value:{form}}", ha="center", va="center", fontsize=7, color="white" if dark else "black"
            )
