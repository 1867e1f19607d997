"""The sub-command `capture`: its flags are the settings of a capture."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from residua.pipelines.cli.job import add_job, add_settings, speaks_for_all
from residua.pipelines.cli.report import print_capture
from residua.pipelines.jobs.stopping import stopping_in_time
from residua.store.base.errors import PlanError


def add(jobs: Any) -> None:
    """Add the sub-command."""
    from residua.pipelines.setup.settings import CaptureSettings

    parser = add_job(jobs, "capture", _capture, "capture a model's activations over a dataset into an archive")
    for name, text in (
        ("model", "hub id or folder of the model"),
        ("dataset", "hub id or path of the dataset: parquet, jsonl, csv, text, arrow"),
        ("out", "folder of the archive; if it exists, the capture goes on"),
        ("config", "YAML or JSON file with any of these settings; flags win over it"),
    ):
        parser.add_argument(f"--{name}", help=text)
    add_settings(parser, fields(CaptureSettings))


def _capture(options: argparse.Namespace) -> int:
    with stopping_in_time():
        return _capture_now(options)


def _capture_now(options: argparse.Namespace) -> int:
    from residua.pipelines.capture.capture import capture_dataset
    from residua.pipelines.cli.progress import CaptureProgress
    from residua.pipelines.setup.settings import CaptureSettings, read_config

    values = read_config(Path(options.config)) if options.config else {}
    values = {key.replace("-", "_"): value for key, value in values.items()}
    names = [setting.name for setting in fields(CaptureSettings)]
    given = {name: getattr(options, name) for name in ("model", "dataset", "out", *names)}
    values.update({name: value for name, value in given.items() if value is not None})
    missing = [name for name in ("model", "dataset", "out") if not isinstance(values.get(name), str)]
    if missing:
        raise PlanError(f"capture needs --{' and --'.join(missing)}")
    model, dataset, out = (values.pop(name) for name in ("model", "dataset", "out"))
    options.out = out
    is_first = speaks_for_all()
    with CaptureProgress(shown=is_first and not options.json) as progress:
        result = capture_dataset(
            model,
            dataset,
            out=out,
            settings=CaptureSettings.from_mapping(values),
            command=options.command_line,
            on_example=progress.example,
            on_plan=progress.plan,
            on_batch=progress.batch,
        )
    if is_first:
        print_capture(result, as_json=options.json)
    return 0
