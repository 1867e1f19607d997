"""The sub-commands `residua patch` and `residua attribute`: which sites and positions carry a behaviour."""

import argparse
from pathlib import Path
from typing import Any

from residua.pipelines.cli.job import add_job, add_split_flags, speaks_for_all
from residua.pipelines.cli.progress import StepProgress
from residua.pipelines.cli.report import print_json, table
from residua.pipelines.jobs.stopping import stopping_in_time
from residua.store.selection.grammar import parse_numbers

_SHOWN = 10


def add(jobs: Any) -> None:
    """Add the sub-commands."""
    sweep = add_job(jobs, "patch", _patch, "put clean activations into a corrupted run, site by site and position")
    sweep.add_argument("--batch-cells", type=int, default=64, metavar="INT", help="cells of one forward pass (64)")
    estimate = add_job(jobs, "attribute", _attribute, "estimate what patching does from one backward pass a pair")
    for parser, folder in ((sweep, "PAIRS-patched"), (estimate, "PAIRS-attributed")):
        parser.add_argument("--model", required=True, help="hub id or folder of the model")
        parser.add_argument(
            "--pairs", required=True, metavar="FILE", help="JSON lines: clean, corrupted, answer, wrong"
        )
        parser.add_argument("--archive", metavar="FOLDER", help="where examples that are named by number lie")
        parser.add_argument("--sites", default="resid_post.*", metavar="STR", help="the sites (resid_post.*)")
        parser.add_argument(
            "--positions",
            metavar="STR",
            help="positions, 0-9,-1 say, negative ones from the end; default: each by itself; 'together': all at once",
        )
        parser.add_argument("--heads", action="store_true", help="each head by itself, at z, q, k and v")
        parser.add_argument(
            "--metric", default="logit_difference", metavar="STR", help="logit_difference, loss, probability or kl"
        )
        parser.add_argument("--out", dest="folder", metavar="FOLDER", help=f"where files go; default: {folder}")
        parser.add_argument("--device", default="auto", metavar="STR", help="device of the model: auto, cpu, cuda, ...")
        add_split_flags(parser)


def _patch(options: argparse.Namespace) -> int:
    from residua.pipelines.circuits.patch import patch

    return _run(options, patch, "patched", batch_cells=options.batch_cells)


def _attribute(options: argparse.Namespace) -> int:
    from residua.pipelines.circuits.patch import attribute

    return _run(options, attribute, "attributed")


def _run(options: argparse.Namespace, way: Any, word: str, **more: int) -> int:
    from residua.pipelines.circuits.sweep import PICTURE, TABLE

    folder = Path(options.folder or f"{Path(options.pairs).stem}-{word}")
    is_first = speaks_for_all()
    with stopping_in_time(), StepProgress("pair", shown=is_first and not options.json) as progress:
        found = way(
            options.model,
            options.pairs,
            sites=options.sites,
            positions=_positions(options.positions),
            heads=options.heads,
            metric=options.metric,
            archive=options.archive,
            out=folder,
            device=options.device,
            tp=options.tp,
            pp=options.pp,
            on_pair=progress.step,
            **more,
        )
    if not is_first:
        return 0
    lines = [line for line in found.to_pylist() if line["recovered"] is not None]
    lines = sorted(lines, key=lambda line: -abs(line["recovered"]))[:_SHOWN]
    if options.json:
        print_json({"folder": str(folder), "n_cells": found.num_rows, "largest": lines})
        return 0
    where = ["position", *(["head"] if options.heads else []), "pair"]
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
    print(table([("site", *where, options.metric, "recovered"), *cells], tuple(range(1, len(where) + 3))))
    print(f"files     {folder}: {TABLE}, {PICTURE}")
    return 0


def _positions(text: str | None) -> Any:
    if text in (None, "together"):
        return text
    return parse_numbers(text, "--positions", signed=True)
