"""The command `capture`. Its flags are the settings of a capture."""

import argparse
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from residua.pipelines.cli.archive import compression
from residua.pipelines.cli.options import MODEL_HELP, add_command, add_settings, given, is_first_process, shows_progress
from residua.pipelines.cli.progress import CaptureProgress
from residua.pipelines.cli.report import human_bytes, print_json, print_nonfinite, table
from residua.pipelines.jobs.stopping import stopping_in_time
from residua.store.base.errors import PlanError
from residua.store.read.summary import summarise

if TYPE_CHECKING:
    from residua.pipelines.capture.result import CaptureResult


def add(commands: Any) -> None:
    """Add the command."""
    from residua.pipelines.data.dataset_settings import DatasetSettings
    from residua.pipelines.setup.capture_settings import CaptureSettings

    text = "store a model's activations over a dataset in an archive"
    description = (
        "Run a model over a dataset and store the activations of the chosen sites in an archive. If the archive "
        "exists, only what is missing is captured. --model, --dataset and --out are required, here or in --config."
    )
    parser = add_command(commands, "capture", _capture, text, description)
    for name, meaning in (
        ("model", f"{MODEL_HELP} (required)"),
        ("dataset", "hub id of a dataset, or path of a file or folder: parquet, jsonl, csv, text, arrow (required)"),
        ("out", "folder of the archive, or its address (s3://, gs://, az://); an unfinished one is resumed (required)"),
        ("config", "YAML or JSON file with any of these settings; flags take precedence (default: none)"),
    ):
        parser.add_argument(f"--{name}", help=meaning)
    add = "sites to add to a finished archive; give all other flags as for its capture (default: none)"
    parser.add_argument("--add-sites", metavar="SITES", help=add)
    of_dataset = fields(DatasetSettings)
    add_settings(parser.add_argument_group("what is captured, and how"), fields(CaptureSettings)[len(of_dataset) :])
    add_settings(parser.add_argument_group("what is read of the dataset"), of_dataset)


def _capture(options: argparse.Namespace) -> int:
    with stopping_in_time():
        from residua.pipelines.capture.add_sites import add_sites
        from residua.pipelines.capture.capture import capture_dataset
        from residua.pipelines.setup.capture_settings import CaptureSettings, read_config

        values = read_config(Path(options.config)) if options.config else {}
        values = {key.replace("-", "_"): value for key, value in values.items()}
        names = ("model", "dataset", "out", *(setting.name for setting in fields(CaptureSettings)))
        values.update(given(options, names))
        missing = [name for name in ("model", "dataset", "out") if not isinstance(values.get(name), str)]
        if missing:
            raise PlanError(f"capture needs --{' and --'.join(missing)}")
        model, dataset, options.out = (values.pop(name) for name in ("model", "dataset", "out"))
        if options.add_sites is not None:
            values["sites"] = options.add_sites
        capture = capture_dataset if options.add_sites is None else add_sites
        is_first = is_first_process()
        with CaptureProgress(shown=is_first and shows_progress(options)) as progress:
            result = capture(
                model,
                dataset,
                out=options.out,
                settings=CaptureSettings.from_mapping(values),
                command=options.command_line,
                on_example=progress.example,
                on_generated=progress.generated,
                on_plan=progress.plan,
                on_batch=progress.batch,
            )
        if is_first:
            _print(result, as_json=options.json)
    return 0


def _print(result: "CaptureResult", *, as_json: bool) -> None:
    archives, stats = list(result.archive.stacks.values()) or [result.archive], result.stats
    summaries = [summarise(archive) for archive in archives]
    if as_json:
        run = {**asdict(stats), "resumed": result.resumed, "notes": list(result.notes)}
        workers = [asdict(worker) for worker in result.workers]
        stacks = {name: one.to_json() for name, one in zip(result.archive.stacks, summaries, strict=False)}
        print_json(
            {
                "archive": {"stacks": stacks} if stacks else summaries[0].to_json(),
                "run": run,
                "workers": workers,
                "dataset": asdict(result.dataset),
            }
        )
        return
    for note in result.notes:
        print(f"note: {note}")
    if result.resumed and not stats.rows:
        print("nothing was missing: the archive is complete")
    for summary in summaries:
        print(f"captured  {len(summary.sites)} sites of {summary.rows:,} rows ({summary.n_examples:,} examples)")
    if stats.rows and stats.seconds:
        rate = human_bytes(stats.logical_bytes / stats.seconds)
        print(
            f"rate      {stats.n_tokens / stats.seconds:,.0f} tokens/s, {rate}/s "
            f"({stats.seconds:.1f} s, of which {stats.stall_seconds:.1f} s waiting for the writer)"
        )
    _print_workers(result)
    for summary in summaries:
        print(f"size      {human_bytes(summary.stored_bytes)}: {compression(summary)}")
    print(f"place     {result.archive.place}")
    print_nonfinite({site.name: site.n_nonfinite for summary in summaries for site in summary.sites})


def _print_workers(result: "CaptureResult") -> None:
    """Print what each of several workers copied to host memory, sent to others and wrote."""
    if len(result.workers) == 1:
        return
    all_bytes = max(1, result.stats.offloaded_bytes)
    rows = [
        (
            f"{worker.worker} on {worker.host}",
            human_bytes(worker.stats.offloaded_bytes),
            f"{100 * worker.stats.offloaded_bytes / all_bytes:.0f} %",
            human_bytes(worker.stats.sent_bytes),
            human_bytes(worker.stats.stored_bytes),
        )
        for worker in result.workers
    ]
    print(table([("worker", "offloaded", "of all", "sent to others", "written"), *rows], (1, 2, 3, 4)))
