"""Plots: lines and heat maps, and the plots of `residua stats`, `residua probe` and `residua lens`.

The ending of a path decides the file format, for example ``.png`` or ``.svg``. Figures need no display and use no
global state of matplotlib, so several threads may draw at the same time.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, MaxNLocator

_DPI = 150
_MOST_TICKS = 24  # more labels would overlap
_MOST_INSIDE = 3  # a longer legend goes outside the axes
_MOST_HORIZONTAL = 7  # more names on the x axis are rotated by 90 degrees
_MOST_CELLS_WITH_NUMBERS = 120
_PANELS_ACROSS = 3
_MOST_CONTROLS = 3  # with more kinds of site, `plot_probe` leaves the control lines out
_FORMS = ((100_000, ".2g"), (100, ".0f"), (0.1, ".2f"))  # of numbers in cells, by the greatest of them
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito (2008)


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
    """Draw one line for each of `series` over `x` and write the plot.

    Args:
        path: File to write.
        x: Positions on the x axis: numbers, or names in order.
        series: Values by name in the legend; NaN leaves a gap.
        title: Title of the plot.
        x_name: Name of the x axis, with its unit if it has one.
        y_name: Name of the y axis, with its unit.
        log_y: Use a logarithmic y axis.
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
        axes.set_xticks(*_ticks(len(x), [str(name) for name in x]), rotation=90 if len(x) > _MOST_HORIZONTAL else 0)
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
    """Draw a matrix as coloured cells, the first row at the top, and write the plot.

    Args:
        path: File to write.
        values: (rows, columns); NaN stays white.
        title: Title of the plot.
        x_name: Name of the columns.
        y_name: Name of the rows.
        value_name: Name of the values, with their unit.
        x_ticks: Names of the columns; their numbers if None.
        y_ticks: Names of the rows; their numbers if None.
        centred: Put zero in the middle of two colours, for values of both signs.
    """
    cells = np.asarray(values, np.float64)
    n_rows, n_columns = cells.shape
    figure, axes = _figure(min(14.0, 3.0 + 0.45 * n_columns), min(12.0, 1.8 + 0.38 * n_rows))
    draw_cells(axes, cells, value_name=value_name, x_ticks=x_ticks, y_ticks=y_ticks, centred=centred)
    _finish(figure, axes, path, title, x_name, y_name)


def heat_maps(
    path: str | PathLike[str],
    panels: Mapping[str, npt.ArrayLike],
    *,
    title: str,
    x_name: str,
    y_name: str,
    y_ticks: Sequence[str] | None = None,
) -> None:
    """Draw matrices of one shape as heat maps side by side, three in a row, each with its own colours.

    Args:
        path: File to write.
        panels: Matrices, (rows, columns), by name; NaN stays white.
        title: Title of the plot.
        x_name: Name of the columns.
        y_name: Name of the rows.
        y_ticks: Names of the rows; their numbers if None.
    """
    values = {name: np.asarray(panel, np.float64) for name, panel in panels.items()}
    n_rows, n_columns = next(iter(values.values())).shape
    n_across = min(_PANELS_ACROSS, len(values))
    n_down = -(-len(values) // n_across)
    width, height = min(8.0, 3.0 + 0.35 * n_columns), min(8.0, 1.8 + 0.3 * n_rows)
    figure = Figure(figsize=(n_across * width, n_down * height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for number, (name, cells) in enumerate(values.items(), start=1):
        axes = figure.add_subplot(n_down, n_across, number)
        draw_cells(axes, cells, value_name="", y_ticks=y_ticks)
        axes.set_title(name)
        axes.set_xlabel(x_name)
        axes.set_ylabel(y_name)
    figure.suptitle(title)
    figure.savefig(path)


def draw_cells(
    axes: Axes,
    values: npt.ArrayLike,
    *,
    value_name: str,
    x_ticks: Sequence[str] | None = None,
    y_ticks: Sequence[str] | None = None,
    centred: bool = False,
    texts: Sequence[Sequence[str]] | None = None,
    every_tick: bool = False,
) -> None:
    """Draw a matrix as coloured cells into axes, the first row at the top.

    Args:
        axes: Axes to draw into.
        values: (rows, columns); NaN stays white.
        value_name: Name of the values, with their unit.
        x_ticks: Names of the columns; their numbers if None.
        y_ticks: Names of the rows; their numbers if None.
        centred: Put zero in the middle of two colours, for values of both signs.
        texts: What to write into each cell; by default its value, where the cells are few.
        every_tick: Name each row and column, however many there are.
    """
    cells = np.asarray(values, np.float64)
    n_rows, n_columns = cells.shape
    finite = np.abs(cells[np.isfinite(cells)])
    most = float(finite.max()) if finite.size else 1.0
    colours = "RdBu_r" if centred else "viridis"
    image = axes.imshow(
        cells, cmap=colours, aspect="auto", vmin=-most if centred else None, vmax=most if centred else None
    )
    axes.figure.colorbar(image, ax=axes, label=value_name)
    x_most, y_most = (n_columns, n_rows) if every_tick else (_MOST_TICKS, _MOST_TICKS)
    axes.set_xticks(*_ticks(n_columns, x_ticks, x_most), rotation=90 if x_ticks and max(map(len, x_ticks)) > 3 else 0)
    axes.set_yticks(*_ticks(n_rows, y_ticks, y_most))
    if texts is not None or cells.size <= _MOST_CELLS_WITH_NUMBERS:
        form = next((form for least, form in _FORMS if np.nanmax(np.abs(cells), initial=0.0) >= least), ".2g")
        numbers = [[f"{value:{form}}" for value in row] for row in cells]
        _write_texts(axes, cells, image, numbers if texts is None else texts, centred=centred)


def notebook_axes(ax: Axes | None, width: float, height: float) -> Axes:
    """Return `ax`, or the axes of a new figure of pyplot, in inches, which a notebook shows."""
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt  # which chooses a backend when it is imported

    _, axes = plt.subplots(figsize=(width, height), layout="constrained")
    return axes


def plot_norms(path: str | PathLike[str], positions: pa.Table) -> None:
    """Plot the mean norm of the rows by position: a line per site, or a heat map for more than seven sites.

    Args:
        path: File to write.
        positions: The `positions` table of `residua.analysis.stats.site_stats.Stats`.
    """
    names = positions["site"].combine_chunks().dictionary_encode()
    sites, at = names.dictionary.to_pylist(), positions["position"].to_numpy()
    norms = np.full((len(sites), int(at.max()) + 1), np.nan)
    norms[names.indices.to_numpy(), at] = positions["norm_mean"].to_numpy()
    title, x_name = "Norm of the rows by position", "position in the example (tokens)"
    if len(sites) <= len(_COLOURS):
        series = {site: line.tolist() for site, line in zip(sites, norms, strict=True)}
        x = list(range(norms.shape[1]))
        line_plot(path, x, series, title=title, x_name=x_name, y_name="mean Euclidean norm", log_y=True)
        return
    with np.errstate(divide="ignore"):
        logs = np.log10(norms)
    logs[np.isinf(logs)] = np.nan
    value_name = "mean Euclidean norm (log10)"
    heat_map(path, logs, title=title, x_name=x_name, y_name="site", value_name=value_name, y_ticks=sites)


def plot_probe(path: str | PathLike[str], scores: pa.Table) -> None:
    """Plot the scores of `residua.probe` over layers, with baseline and control, a line per kind of site.

    The score of classes is balanced accuracy, of which a constant guess reaches one in as many as there are classes.

    If a site has no layer, because it lies outside the blocks, the x axis shows site names instead.

    Args:
        path: File to write.
        scores: The table that `residua.probe` returned.
    """
    score, control, baseline, score_name, baseline_name = (
        (
            *("balanced_accuracy", "control_balanced_accuracy", "majority_balanced_accuracy"),
            *("balanced accuracy", "always the commonest class"),
        )
        if "accuracy" in scores.column_names
        else ("r2", "control_r2", "baseline_r2", "R²", "always the mean")
    )
    lines: list[dict[str, Any]] = scores.to_pylist()
    x_name = "site" if any(line["layer"] is None for line in lines) else "layer"
    x = [line["site"] for line in lines] if x_name == "site" else sorted({line["layer"] for line in lines})
    kinds: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        kinds.setdefault(score_name if x_name == "site" else line["site"].partition(".")[0], []).append(line)
    if len(kinds) == 1:
        kinds = {score_name: lines}

    def over_x(column: str, lines: list[dict[str, Any]]) -> list[float]:
        known = {line[x_name]: line[column] for line in lines if line[column] is not None}
        return [known.get(at, float("nan")) for at in x]

    series = {kind: over_x(score, chosen) for kind, chosen in kinds.items()}
    if len(kinds) <= _MOST_CONTROLS:
        series |= {f"{kind}, shuffled labels": over_x(control, chosen) for kind, chosen in kinds.items()}
    series[baseline_name] = over_x(baseline, lines)
    title, y_name = f"Linear probes of {lines[0]['target']}", f"{score_name} on held-out documents"
    line_plot(path, x, series, title=title, x_name=x_name, y_name=y_name)


def plot_lens(path: str | PathLike[str], report: pa.Table) -> None:
    """Plot the KL divergence of the tuned lens and of the logit lens by site.

    Args:
        path: File to write.
        report: A table with the columns of `residua.analysis.lens.evaluate.REPORT`.
    """
    line_plot(
        path,
        report["site"].to_pylist(),
        {"logit lens": report["kl_logit_lens"].to_pylist(), "tuned lens": report["kl"].to_pylist()},
        title=f"Distance from the model's own prediction, {report['rows'][0].as_py():,} held-out rows",
        x_name="site",
        y_name="KL divergence (nats a token)",
        log_y=True,
    )


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _finish(figure: Figure, axes: Axes, path: str | PathLike[str], title: str, x_name: str, y_name: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name)
    figure.savefig(path)


def _ticks(count: int, names: Sequence[str] | None, most: int = _MOST_TICKS) -> tuple[list[int], list[str]]:
    """Return evenly spaced indices below `count`, at most `most`, and their labels."""
    places = list(range(0, count, -(-count // most)))
    return places, [str(place) if names is None else names[place] for place in places]


def _write_texts(
    axes: Axes,
    cells: npt.NDArray[np.float64],
    image: AxesImage,
    texts: Sequence[Sequence[str]],
    *,
    centred: bool,
) -> None:
    """Write a text into each cell, in black on light colours and in white on dark ones."""
    shades = np.ma.filled(image.norm(cells), 0.0)
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            shade = shades[row, column]
            dark = abs(shade - 0.5) > 0.35 if centred else shade < 0.6
            colour = "white" if dark else "black"
            axes.text(column, row, str(texts[row][column]), ha="center", va="center", fontsize=7, color=colour)
