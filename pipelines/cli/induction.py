"""The sub-command `residua induction`: which heads of a model are induction heads."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from residua.pipelines.cli.job import add_cluster_flags, add_job, cluster_of, speaks_for_all
from residua.pipelines.cli.report import print_json, table
from residua.pipelines.jobs.stopping import stopping_in_time

if TYPE_CHECKING:
    from residua.pipelines.circuits.induction import InductionResult
    from residua.store.read.archive import Archive

_SHOWN = 10
_CAPTURE = ("dtype", "model_dtype", "device", "device_map", "batch_tokens", "revision", "codec")


def add(jobs: Any) -> None:
    """Add the sub-command."""
    parser = add_job(jobs, "induction", _induction, "score every head of a model on repeated random tokens")
    parser.add_argument("--model", required=True, help="hub id or folder of the model")
    parser.add_argument("--out", required=True, help="folder of the archive; if it exists, the capture goes on")
    parser.add_argument(
        "--from", dest="captured_from", choices=("qk", "pattern"), default="qk", help="what is captured"
    )
    parser.add_argument("--period", type=int, default=50, metavar="INT", help="tokens of a block (50)")
    parser.add_argument("--copies", type=int, default=2, metavar="INT", help="how often it stands there (2)")
    parser.add_argument("--examples", type=int, default=64, metavar="INT", help="sequences (64)")
    parser.add_argument(
        "--bos", action=argparse.BooleanOptionalAction, help="put a BOS in front; default: where the model has one"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="INT", help="seed of the random tokens (0)")
    for name in _CAPTURE:
        kind = int if name == "batch_tokens" else str
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help="as for residua capture")
    add_cluster_flags(parser)


def _induction(options: argparse.Namespace) -> int:
    from residua.pipelines.circuits.induction import capture_repeats, score_repeats
    from residua.pipelines.circuits.repeats import RepeatSettings
    from residua.pipelines.cli.progress import CaptureProgress
    from residua.pipelines.setup.settings import CaptureSettings

    given = {name: value for name in _CAPTURE if (value := getattr(options, name)) is not None}
    is_first = speaks_for_all()
    with stopping_in_time(), CaptureProgress(shown=is_first and not options.json) as progress:
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
    if not is_first:  # the capture is what takes time, and what all share
        return 0
    with cluster_of(options) as cluster:
        found = score_repeats(archive, name=Path(options.model).name, cluster=cluster)
    _print(found, archive, as_json=options.json)
    return 0


def _print(found: "InductionResult", archive: "Archive", *, as_json: bool) -> None:
    strongest = found.strongest(_SHOWN)
    if as_json:
        print_json({"strongest": strongest, "archive": str(archive.path), "folder": str(found.folder)})
        return
    head = ("layer", "head", "induction", "prefix matching", "previous token", "duplicate token")
    names = [name.replace(" ", "_") for name in head]
    lines = [
        [str(line[name]) if name in ("layer", "head") else f"{line[name]:.3f}" for name in names] for line in strongest
    ]
    print(f"the {len(lines)} strongest of {found.scores.num_rows} heads:")
    print(table([head, *lines], tuple(range(len(head)))))
    print(f"archive   {archive.path}")
    print(f"files     {found.folder}: heads.parquet, induction.png")
