"""The command `probe`: linear probes of a target, site by site, as a table and a picture."""

import argparse
from pathlib import Path
from typing import Any

from residua.pipelines.cli.options import (
    MANY_PASSES,
    WHERE_HELP,
    add_archive,
    add_cluster_flags,
    add_command,
    add_flag,
    add_results,
    add_switch,
    cluster_of,
    default_folder,
)
from residua.pipelines.cli.report import print_json, table
from residua.pipelines.setup.capture_settings import SITES_HELP
from residua.store.base.errors import few

_SHOWN = {
    "balanced_accuracy": "balanced accuracy",
    "majority_balanced_accuracy": "commonest class",
    "control_balanced_accuracy": "shuffled labels",
    "accuracy": "accuracy",
    "majority_accuracy": "commonest class",
    "control_accuracy": "shuffled labels",
    "control_majority_accuracy": "commonest of these",
    "auc": "AUC",
    "r2": "R²",
    "baseline_r2": "R² of the mean",
    "control_r2": "R², shuffled labels",
    "control_baseline_r2": "of their mean",
    "rmse": "error (RMS)",
    "penalty": "penalty",
}


def add(commands: Any) -> None:
    """Add the command."""
    from residua.analysis.lens.lens_settings import GROUP_HELP

    text = "fit linear probes of a target, site by site"
    description = (
        "Fit a linear probe of a target at each site, test it on held-out documents, and compare it with a probe of "
        "shuffled labels (the control). Writes the probes, a table and a picture."
    )
    parser = add_command(commands, "probe", _probe, text, description)
    add_archive(parser)
    text = "what to predict: token, position, a column of the examples, or a condition such as 'position > 10'"
    add_flag(parser, "--target", text, required=True)
    add_flag(parser, "--sites", SITES_HELP, "*")
    tasks = ("classification", "regression")
    add_flag(parser, "--task", "kind of probe (default: by the target's values)", choices=tasks, metavar=None)
    add_flag(parser, "--where", WHERE_HELP)
    text = "make one row of the rows of each example (default: every row counts)"
    add_flag(parser, "--pool", text, choices=("last", "mean", "max"), metavar=None)
    add_flag(parser, "--test-fraction", "share of the documents that are held out for the test", 0.2)
    add_flag(parser, "--group", GROUP_HELP, metavar="COLUMN")
    text = "regress token ids, or texts by their alphabetical rank, although such numbers measure nothing"
    add_switch(parser, "--as-numbers", text)
    add_flag(parser, "--seed", "random seed for the held-out split and for the control", 0)
    add_results(parser, "the files", "ARCHIVE-probe-TARGET")
    add_cluster_flags(parser)


def _probe(options: argparse.Namespace) -> int:
    from pyarrow.parquet import write_table

    from residua.analysis.probes.probe import probe
    from residua.analysis.support.plots import plot_probe
    from residua.store.read.stacks import open_archive
    from residua.store.storage.place import result_folder

    archive = open_archive(options.archive)
    place = options.folder or default_folder(archive.place, "probe", options.target, options.where, options.pool)
    with result_folder(place) as folder:
        with cluster_of(options, archive, options.sites, passes=MANY_PASSES) as cluster:
            found = probe(
                archive,
                options.target,
                options.sites,
                task=options.task,
                where=options.where,
                pool=options.pool,
                test_fraction=options.test_fraction,
                seed=options.seed,
                group=options.group,
                as_numbers=options.as_numbers,
                save=folder / "probes",
                cluster=cluster,
            )
        write_table(found, folder / "probe.parquet")
        plot_probe(folder / "probe.png", found)
    if options.json:
        print_json({"sites": found.to_pylist(), "folder": str(place)})
    else:
        _print(found.to_pylist(), place)
    return 0


def _print(lines: list[dict[str, Any]], folder: str | Path) -> None:
    first = lines[0]
    print(f"{first['n_train']:,} rows to learn from, {first['n_test']:,} of held-out documents to test on")
    shown = [name for name in _SHOWN if any(line.get(name) is not None for line in lines)]
    cells = [(line["site"], *(_cell(line[name]) for name in shown)) for line in lines]
    print(table([("site", *(_SHOWN[name] for name in shown)), *cells], range(1, len(shown) + 1)))
    for line in lines:
        if line["n_left_out"]:
            print(f"warning: {line['site']}: {line['n_left_out']:,} rows with NaN or infinite values are left out")
        for name, what in (("not_learned", "learn"), ("not_tested", "test")):
            if line.get(name):
                print(f"warning: {line['site']}: there are no rows to {what} {few(line[name])} with")
        if not line.get("converged", True):
            print(f"warning: {line['site']}: the fit stopped before the gradient vanished")
    print(f"files     {folder}: probe.parquet, probe.png, and the probes themselves in probes/")


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
