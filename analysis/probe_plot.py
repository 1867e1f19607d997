"""The picture of `residua probe`: scores by layer, beside the baseline and the control."""

from os import PathLike

import pyarrow as pa

from residua.analysis.plots import line_plot

_SCORES = {
    "accuracy": ("accuracy on held-out examples", "accuracy", "majority_accuracy", "control_accuracy"),
    "r2": ("R² on held-out examples", "R²", "baseline_r2", "control_r2"),
}


def plot_probe(path: str | PathLike[str], found: pa.Table) -> None:
    """Draw the scores of a table that `residua.analysis.probe.probe` made: by layer, a line for each kind of site.

    Args:
        path: The file to write; its ending says the format.
        found: The table.
    """
    score = "accuracy" if "accuracy" in found.column_names else "r2"
    y_name, word, baseline, control = _SCORES[score]
    lines = found.to_pylist()
    has_layers = all(line["layer"] is not None for line in lines)
    x = sorted({line["layer"] for line in lines}) if has_layers else [line["site"] for line in lines]
    kinds = list(dict.fromkeys(_kind(line["site"]) if has_layers else "" for line in lines))
    series: dict[str, list[float]] = {}
    for column, name in ((score, word), (control, f"{word} of shuffled labels"), (baseline, _baseline(score))):
        for kind in kinds[:1] if column == baseline else kinds:
            known = {
                line["layer"] if has_layers else line["site"]: line[column]
                for line in lines
                if not has_layers or _kind(line["site"]) == kind
            }
            values = [known.get(place) for place in x]
            label = name if len(kinds) == 1 or column == baseline else f"{kind}: {name}"
            series[label] = [float("nan") if value is None else value for value in values]
    line_plot(
        path,
        x,
        series,
        title=f"Linear probes of {lines[0]['target']}",
        x_name="layer" if has_layers else "site",
        y_name=y_name,
    )


def _kind(site: str) -> str:
    return site.partition(".")[0]


def _baseline(score: str) -> str:
    return "always the commonest class" if score == "accuracy" else "always the mean"
