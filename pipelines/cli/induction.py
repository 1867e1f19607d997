"""The command `induction`: which heads of a model are induction heads."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from residua.pipelines.cli.options import (
    MODEL_HELP,
    add_cluster_flags,
    add_command,
    add_flag,
    add_settings,
    cluster_of,
    is_first_process,
    shows_progress,
)
from residua.pipelines.cli.progress import CaptureProgress
from residua.pipelines.cli.report import print_json, table
from residua.pipelines.jobs.stopping import stopping_in_time

if TYPE_CHECKING:
    from residua.pipelines.circuits.induction import InductionResult
    from residua.store.read.archive import Archive

_SHOWN = 10
_CAPTURE = ("dtype", "model_dtype", "device", "device_map", "batch_tokens", "revision", "codec")


def add(commands: Any) -> None:
    """Add the command."""
    from residua.pipelines.setup.settings import CaptureSettings

    text = "score every attention head on repeated random tokens"
    description = (
        "Capture a model's queries and keys (or attention patterns) on sequences of random tokens that repeat, into an "
        "archive, and score every head: how much of its attention goes to the token after an earlier copy of the "
        "current token (induction), and the like."
    )
    parser = add_command(commands, "induction", _induction, text, description)
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--out", required=True, help="folder of the archive; an unfinished one is resumed")
    text = "what to capture: queries and keys, which are smaller, or attention patterns"
    add_flag(parser, "--from", text, "qk", dest="captured_from", choices=("qk", "pattern"), metavar=None)
    add_flag(parser, "--period", "tokens of the block that is repeated", 50)
    add_flag(parser, "--copies", "copies of the block in a sequence", 2)
    add_flag(parser, "--examples", "number of sequences", 64)
    add_flag(parser, "--seed", "seed of the random tokens", 0)
    text = "put a BOS before each sequence (default: on if the model has a BOS)"
    parser.add_argument("--bos", action=argparse.BooleanOptionalAction, help=text)
    add_settings(parser, [setting for setting in fields(CaptureSettings) if setting.name in _CAPTURE])
    add_cluster_flags(parser)


def _induction(options: argparse.Namespace) -> int:
    from residua.pipelines.circuits.induction import capture_repeats, heads_folder, score_repeats
    from residua.pipelines.circuits.repeats import RepeatSettings
    from residua.pipelines.setup.settings import CaptureSettings

    given = {name: value for name in _CAPTURE if (value := getattr(options, name)) is not None}
    is_first = is_first_process()
    if is_first:
        heads_folder(Path(options.out))
    with stopping_in_time(), CaptureProgress(shown=is_first and shows_progress(options)) as progress:
        archive = capture_repeats(
            options.model,
            out=options.out,
            repeats=RepeatSettings(
                period=options.period,
                copies=options.copies,
                n_examples=options.examples,
                bos=options.bos,
                seed=options.seed,
            ),
            captured_from=options.captured_from,
            settings=CaptureSettings.from_mapping(given),
            command=options.command_line,
            on_example=progress.example,
            on_plan=progress.plan,
            on_batch=progress.batch,
        ).archive
    if not is_first:  # all share the capture, which takes the time; the scores are made once
        return 0
    with cluster_of(options) as cluster:
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
