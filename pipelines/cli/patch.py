"""The commands `patch` and `attribute`: which sites and positions carry a behaviour."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from residua.pipelines.cli.options import (
    MODEL_HELP,
    add_command,
    add_flag,
    add_results,
    add_settings,
    given,
    is_first_process,
    shows_progress,
)
from residua.pipelines.cli.progress import StepProgress
from residua.pipelines.cli.report import print_json, table
from residua.pipelines.jobs.stopping import stopping_in_time
from residua.store.selection.grammar import parse_numbers

_SHOWN = 10


def add(commands: Any) -> None:
    """Add the commands."""
    from residua.pipelines.circuits.circuit_settings import SweepSettings

    text = "put clean activations into a corrupted run, site by site"
    description = (
        "Activation patching: for each pair of a clean and a corrupted prompt, put the clean run's activation at one "
        "site and position (a cell) into the corrupted run, and measure how much of the metric it recovers."
    )
    sweep = add_command(commands, "patch", _patch, text, description)
    add_flag(sweep, "--batch-cells", "cells in one forward pass", 64)
    text = "estimate what patching does, from gradients"
    description = (
        "Attribution patching: estimate the effect of patching every cell from one backward pass a pair. Much faster "
        "than residua patch, and less exact."
    )
    estimate = add_command(commands, "attribute", _attribute, text, description)
    for parser, folder in ((sweep, "PAIRS-patched"), (estimate, "PAIRS-attributed")):
        parser.add_argument("--model", required=True, help=MODEL_HELP)
        text = "file of JSON lines, or its address: one pair each, with the keys clean, corrupted, answer and wrong"
        add_flag(parser, "--pairs", text, required=True, metavar="FILE")
        text = "archive with the examples, or its address, if pairs name prompts by example number (default: none)"
        add_flag(parser, "--archive", text, metavar="FOLDER")
        add_results(parser, "the table and the picture", folder)
        add_settings(parser, fields(SweepSettings))


def _patch(options: argparse.Namespace) -> int:
    from residua.pipelines.circuits.patch import patch

    return _run(options, patch, "patched", batch_cells=options.batch_cells)


def _attribute(options: argparse.Namespace) -> int:
    from residua.pipelines.circuits.patch import attribute

    return _run(options, attribute, "attributed")


def _run(options: argparse.Namespace, way: Any, word: str, **more: int) -> int:
    from residua.pipelines.circuits.circuit_settings import SweepSettings
    from residua.pipelines.circuits.sweep import PICTURE, TABLE

    folder = options.folder or f"{Path(options.pairs).stem}-{word}"
    asked = given(options, (setting.name for setting in fields(SweepSettings)))
    if asked.get("positions", "together") != "together":
        asked["positions"] = parse_numbers(options.positions, "--positions", signed=True)
    settings = SweepSettings(**asked)
    is_first = is_first_process()
    with stopping_in_time(), StepProgress("pair", shown=is_first and shows_progress(options)) as progress:
        found = way(
            options.model,
            options.pairs,
            archive=options.archive,
            out=folder,
            on_pair=progress.step,
            **asked,
            **more,
        )
    if not is_first:
        return 0
    lines = [line for line in found.to_pylist() if line["recovered"] is not None]
    lines = sorted(lines, key=lambda line: -abs(line["recovered"]))[:_SHOWN]
    if options.json:
        print_json({"folder": folder, "n_cells": found.num_rows, "largest": lines})
        return 0
    where = ["position", *(["head"] if settings.heads else []), "pair"]
    cells = [
        (
            line["site"],
            *("all" if line[name] is None else f"{line[name]}" for name in where),
            f"{line['value']:.4g}",
            f"{line['recovered']:.3f}",
        )
        for line in lines
    ]
    print(f"the {len(cells)} largest of {found.num_rows:,} cells:")
    print(table([("site", *where, settings.metric, "recovered"), *cells], tuple(range(1, len(where) + 3))))
    print(f"files     {folder}: {TABLE}, {PICTURE}")
    return 0
