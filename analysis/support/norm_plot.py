"""The picture of `residua stats`: how long the rows of each site are at each position of an example."""

from os import PathLike

import numpy as np
import pyarrow as pa

from residua.analysis.support.plots import heat_map, line_plot

_MOST_LINES = 7  # that can be told apart


def plot_norms(path: str | PathLike[str], positions: pa.Table) -> None:
    """Draw the mean norm by position: a line for each of a few sites, else a line of coloured cells for each.

    Args:
        path: The file to write; its ending says the format.
        positions: As `residua.analysis.stats.stats.Stats` has them.
    """
    names = positions["site"].combine_chunks().dictionary_encode()
    sites, at = names.dictionary.to_pylist(), positions["position"].to_numpy()
    norms = np.full((len(sites), int(at.max()) + 1), np.nan)
    norms[names.indices.to_numpy(), at] = positions["norm_mean"].to_numpy()
    title, x_name = "Norm of the rows by position", "position in the example (tokens)"
    if len(sites) <= _MOST_LINES:
        series = {site: line.tolist() for site, line in zip(sites, norms, strict=True)}
        x = list(range(norms.shape[1]))
        line_plot(path, x, series, title=title, x_name=x_name, y_name="mean Euclidean norm", log_y=True)
        return
    with np.errstate(divide="ignore"):
        logs = np.log10(norms)
    logs[np.isinf(logs)] = np.nan
    heat_map(
        path,
        logs,
        title=title,
        x_name=x_name,
        y_name="site",
        value_name="mean Euclidean norm (log10)",
        y_ticks=sites,
    )
