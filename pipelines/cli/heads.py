"""The commands `induction` and `heads`: what the attention heads of a model, or of an archive, look at."""

import argparse
import math
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from residua.pipelines.cli.options import (
    MANY_PASSES,
    MODEL_HELP,
    add_archive,
    add_cluster_flags,
    add_command,
    add_flag,
    add_results,
    add_settings,
    cluster_of,
    default_folder,
    given,
    is_first_process,
    shows_progress,
)
from residua.pipelines.cli.progress import CaptureProgress
from residua.pipelines.cli.report import print_json, table
from residua.pipelines.jobs.stopping import stopping_in_time
from residua.store.selection.grammar import parse_numbers

if TYPE_CHECKING:
    from residua.pipelines.circuits.induction import InductionResult
    from residua.store.read.archive import Archive

_SHOWN = 10
_CAPTURE = ("dtype", "model_dtype", "device", "device_map", "batch_tokens", "revision", "codec")


def add(commands: Any) -> None:
    """Add the commands."""
    _add_induction(commands)
    _add_heads(commands)


def _add_induction(commands: Any) -> None:
    from residua.pipelines.circuits.circuit_settings import RepeatSettings
    from residua.pipelines.setup.capture_settings import CaptureSettings

    text = "score every attention head on repeated random tokens"
    description = (
        "Capture a model's queries and keys (or attention patterns) on sequences of random tokens that repeat, into an "
        "archive, and score every head: how much of its attention goes to the token after an earlier copy of the "
        "current token (induction), and the like."
    )
    parser = add_command(commands, "induction", _induction, text, description)
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument(
        "--out", required=True, help="folder of the archive, which is resumed, or its address in a bucket"
    )
    text = "what to capture: queries and keys, which are smaller, or attention patterns"
    add_flag(parser, "--from", text, "qk", dest="captured_from", choices=("qk", "pattern"), metavar=None)
    add_settings(parser, fields(RepeatSettings))
    add_settings(parser, [setting for setting in fields(CaptureSettings) if setting.name in _CAPTURE])
    add_cluster_flags(parser)


def _induction(options: argparse.Namespace) -> int:
    from residua.pipelines.circuits.circuit_settings import RepeatSettings
    from residua.pipelines.circuits.induction import capture_repeats, heads_place, score_repeats
    from residua.pipelines.setup.capture_settings import CaptureSettings

    is_first = is_first_process()
    if is_first:
        heads_place(options.out)
    with stopping_in_time(), CaptureProgress(shown=is_first and shows_progress(options)) as progress:
        archive = capture_repeats(
            options.model,
            out=options.out,
            repeats=RepeatSettings(**given(options, (setting.name for setting in fields(RepeatSettings)))),
            captured_from=options.captured_from,
            settings=CaptureSettings.from_mapping(given(options, _CAPTURE)),
            command=options.command_line,
            on_example=progress.example,
            on_plan=progress.plan,
            on_batch=progress.batch,
        ).archive
    if not is_first:  # all share the capture, which takes the time; the scores are made once
        return 0
    with cluster_of(options, archive, passes=MANY_PASSES) as cluster:
        found = score_repeats(archive, name=Path(options.model).name, cluster=cluster)
    _print(found, archive, as_json=options.json)
    return 0


def _print(found: "InductionResult", archive: "Archive", *, as_json: bool) -> None:
    strongest = found.strongest(_SHOWN)
    if as_json:
        print_json({"strongest": strongest, "archive": archive.place, "folder": str(found.folder)})
        return
    heading = ("layer", "head", "induction", "prefix matching", "previous token", "duplicate token")
    names = [name.replace(" ", "_") for name in heading]
    lines = [
        [str(line[name]) if name in ("layer", "head") else f"{line[name]:.3f}" for name in names] for line in strongest
    ]
    print(f"the {len(lines)} strongest of {found.scores.num_rows} heads:")
    print(table([heading, *lines], tuple(range(len(heading)))))
    print(f"archive   {archive.place}")
    print(f"files     {found.folder}: heads.parquet, induction.png")


def _add_heads(commands: Any) -> None:
    text = "measure what every attention head looks at, and write the files that HeadVis's page opens"
    description = (
        "Compute the six measures of HeadVis for every attention head from stored queries and keys or patterns: "
        "self-attention, previous token, entropy, distance from query to key and its variance, induction. Writes a "
        "table, a picture and the JSON tree that HeadVis's page opens."
    )
    parser = add_command(commands, "heads", _heads, text, description)
    add_archive(parser)
    text = "where the attention weights come from: qk or pattern (default: patterns if they are stored)"
    add_flag(parser, "--from", text, dest="source", choices=("qk", "pattern"), metavar=None)
    add_flag(parser, "--layers", "layers to measure, for example 0,3-5 (default: all that can be)", metavar="NUMBERS")
    text = "examples of each head that HeadVis's page shows at each of ten levels of attention; 0 shows none"
    add_flag(parser, "--sequences", text, 2)
    add_results(parser, "the files", "ARCHIVE-heads")
    add_cluster_flags(parser)


def _heads(options: argparse.Namespace) -> int:
    from residua.analysis.attention.heads import MEASURES
    from residua.analysis.attention.headvis import heads
    from residua.store.read.stacks import open_archive

    layers = None if options.layers is None else parse_numbers(options.layers, "--layers")
    archive = open_archive(options.archive)
    place = options.folder or default_folder(archive.place, "heads", options.layers)
    with cluster_of(options, archive, passes=MANY_PASSES) as cluster:
        found = heads(
            archive, out=place, layers=layers, source=options.source, sequences=options.sequences, cluster=cluster
        )
    strongest = [
        max(found.to_pylist(), key=lambda line: -math.inf if line[name] is None else line[name]) for name in MEASURES
    ]
    if options.json:
        named = dict(zip(MEASURES, strongest, strict=True))
        print_json({"heads": found.num_rows, "highest": named, "archive": archive.place, "folder": str(place)})
        return 0
    print(f"{found.num_rows} heads; the highest by each measure:")
    lines = [
        (name, f"{line['layer']}", f"{line['head']}", "-" if line[name] is None else f"{line[name]:.3f}")
        for name, line in zip(MEASURES, strongest, strict=True)
    ]
    print(table([("measure", "layer", "head", "value"), *lines], (1, 2, 3)))
    print(f"archive   {archive.place}")
    print(f"files     {place}: measures.parquet, measures.csv, measures.png; for HeadVis: config.json and the others")
    return 0
