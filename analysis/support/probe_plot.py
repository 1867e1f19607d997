"""The picture of `residua probe`: scores by layer, beside the baseline and the control."""

from os import PathLike
from typing import Any

import pyarrow as pa

from residua.analysis.support.plots import line_plot

_MOST_CONTROLS = 3  # kinds of site beyond which the control is left to the table, or the picture would be too full


def plot_probe(path: str | PathLike[str], found: pa.Table) -> None:
    """Draw the scores of a table that `residua.probe` made: over the layers, a line for each kind of site.

    Sites outside the blocks have no layer; with one of them, the x axis has the names of the sites.

    Args:
        path: The file to write; its ending says the format.
        found: The table.
    """
    is_classes = "accuracy" in found.column_names
    score, control, baseline, word, always = (
        ("accuracy", "control_accuracy", "majority_accuracy", "accuracy", "always the commonest class")
        if is_classes
        else ("r2", "control_r2", "baseline_r2", "R²", "always the mean")
    )
    lines = found.to_pylist()
    place = "site" if any(line["layer"] is None for line in lines) else "layer"
    x = [line["site"] for line in lines] if place == "site" else sorted({line["layer"] for line in lines})
    kinds: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        kinds.setdefault(word if place == "site" else line["site"].partition(".")[0], []).append(line)
    if len(kinds) == 1:
        kinds = {word: lines}
    series = {kind: _over(x, place, score, chosen) for kind, chosen in kinds.items()}
    if len(kinds) <= _MOST_CONTROLS:
        series |= {f"{kind}, shuffled labels": _over(x, place, control, chosen) for kind, chosen in kinds.items()}
    series[always] = _over(x, place, baseline, lines)
    title, y_name = f"Linear probes of {lines[0]['target']}", f"{word} on held-out examples"
    line_plot(path, x, series, title=title, x_name=place, y_name=y_name)


def _over(x: list[Any], place: str, column: str, lines: list[dict[str, Any]]) -> list[float]:
    """Return the numbers of `column` in the order of `x`; NaN, which leaves a gap, where there is none."""
    known = {line[place]: line[column] for line in lines if line[column] is not None}
    return [known.get(at, float("nan")) for at in x]
