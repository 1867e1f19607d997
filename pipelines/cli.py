"""The command line: one command, one sub-command per job, each a thin wrapper over a public function.

Exit codes: 0 done, 1 the answer is no (`verify` found damage, the capture failed), 2 the request itself was wrong,
130 stopped by the user.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from residua.pipelines.progress import StepProgress
from residua.pipelines.report import (
    print_capture,
    print_info,
    print_reproduction,
    print_sites,
    print_verification,
)
from residua.pipelines.stopping import stopping_in_time
from residua.store.errors import (
    CaptureError,
    DamagedArchiveError,
    NotCapturedError,
    PlanError,
    ResiduaError,
)

Run = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)
    options.command_line = " ".join(["residua", *words])
    run: Run = options.run
    try:
        return run(options)
    except (CaptureError, DamagedArchiveError, NotCapturedError) as error:
        return _fail(options, error, 1)
    except (ResiduaError, OSError, IndexError) as error:
        return _fail(options, error, 2)
    except KeyboardInterrupt:
        return _stopped(options, getattr(options, "out", None))


def _fail(options: argparse.Namespace, error: Exception, code: int) -> int:
    if options.json:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
    else:
        print(f"residua: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="residua", description="Capture, store and read the activations of transformer models."
    )
    jobs = parser.add_subparsers(title="jobs", required=True, metavar="JOB")
    _add_capture(jobs)
    info = _add(jobs, "info", _info, "show what an archive holds")
    info.add_argument("archive", help="folder of the archive")
    verify = _add(jobs, "verify", _verify, "re-hash every chunk of an archive; exit 1 if anything is damaged")
    verify.add_argument("archive", help="folder of the archive")
    reproduce = _add(
        jobs, "reproduce", _reproduce, "capture a sample of an archive again and compare; exit 1 if it differs"
    )
    reproduce.add_argument("archive", help="folder of the archive")
    reproduce.add_argument("--model", required=True, help="hub id or folder of the model that was captured")
    reproduce.add_argument("--batches", type=int, default=4, metavar="INT", help="batches to run (default: 4)")
    reproduce.add_argument("--seed", type=int, default=0, metavar="INT", help="seed of the choice of batches")
    reproduce.add_argument("--device", default="auto", metavar="STR", help="device of the model: auto, cpu, cuda, ...")
    sites = _add(jobs, "sites", _sites, "list the sites that a model has, with shapes")
    sites.add_argument("--model", required=True, help="hub id or folder of the model")
    return parser


def _add(jobs: Any, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = jobs.add_parser(name, help=text, description=text)
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    parser.set_defaults(run=run)
    return parser


def _add_capture(jobs: Any) -> None:
    from residua.pipelines.settings import CaptureSettings

    parser = _add(jobs, "capture", _capture, "capture a model's activations over a dataset into an archive")
    for name, text in (
        ("model", "hub id or folder of the model"),
        ("dataset", "hub id or path of the dataset: parquet, jsonl, csv, text, arrow"),
        ("out", "folder of the archive; if it exists, the capture goes on"),
        ("config", "YAML or JSON file with any of these settings; flags win over it"),
    ):
        parser.add_argument(f"--{name}", help=text)
    for setting in fields(CaptureSettings):
        flag, text = "--" + setting.name.replace("_", "-"), setting.metadata["help"]
        if setting.type in (bool, "bool"):
            parser.add_argument(flag, action="store_true", default=None, help=text)
        else:
            kind = int if "int" in str(setting.type) else str
            parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text)


def _capture(options: argparse.Namespace) -> int:
    with stopping_in_time():
        return _capture_now(options)


def _capture_now(options: argparse.Namespace) -> int:
    from transformers.utils.logging import disable_progress_bar

    from residua.pipelines.capture import capture_dataset
    from residua.pipelines.progress import CaptureProgress
    from residua.pipelines.settings import CaptureSettings, read_config

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
    is_first = os.environ.get("RANK", "0") == "0"  # of those that a launcher started, one speaks
    if not is_first:
        disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it bare
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


def _stopped(options: argparse.Namespace, out: str | None) -> int:
    from residua.store.archive import Archive
    from residua.store.metadata import is_archive

    rows, total = 0, None
    if out is not None and is_archive(Path(out)):
        rows, total, *_ = Archive(out).progress
    of = "" if total is None else f" of {total:,}"
    message = "stopped"
    if options.run is _capture:
        message = f"stopped: {rows:,}{of} rows are captured and safe. Run the same command again to go on."
    print(json.dumps({"stopped": True, "rows": rows, "total_rows": total}) if options.json else f"residua: {message}")
    return 130


def _info(options: argparse.Namespace) -> int:
    from residua.store.archive import Archive
    from residua.store.summary import summarise

    print_info(summarise(Archive(options.archive)), as_json=options.json)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from residua.store.verify import verify

    with StepProgress("shard", shown=not options.json) as progress:
        report = verify(Path(options.archive), on_shard=progress.step)
    print_verification(report, as_json=options.json)
    return 0 if report.is_sound else 1


def _reproduce(options: argparse.Namespace) -> int:
    from residua.pipelines.reproduce import reproduce

    with StepProgress("batch", shown=not options.json) as progress:
        found = reproduce(
            options.archive,
            options.model,
            n_batches=options.batches,
            seed=options.seed,
            device=options.device,
            on_batch=progress.step,
        )
    print_reproduction(found, as_json=options.json)
    return 0 if found.is_exact else 1


def _sites(options: argparse.Namespace) -> int:
    from residua.capture.sites import model_sites
    from residua.pipelines.models import load_empty_model

    print_sites(options.model, model_sites(load_empty_model(options.model)), as_json=options.json)
    return 0
