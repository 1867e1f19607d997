"""What the sub-commands share: how a job is added to the command line, and the flags of a cluster."""

import argparse
import hashlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import Field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from residua.pipelines.cli.progress import StepProgress

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from residua.analysis.support.cluster import Cluster

Found = TypeVar("Found")
Run = Callable[[argparse.Namespace], int]


def add_job(jobs: Any, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    """Add a sub-command.

    Args:
        jobs: What ``add_subparsers`` returned.
        name: Its word on the command line.
        run: Does the job and returns the exit code.
        text: One line of help.
    """
    parser: argparse.ArgumentParser = jobs.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    parser.set_defaults(run=run)
    return parser


def add_settings(parser: argparse.ArgumentParser, settings: Iterable[Field[Any]]) -> None:
    """Add a flag for each field of a settings class, with the help of its metadata and its default.

    A flag that is not given is None, so that a settings file or the class's own default applies.
    """
    for setting in settings:
        flag, text, default = "--" + setting.name.replace("_", "-"), setting.metadata["help"], setting.default
        if isinstance(default, bool):
            text += f" (default: {'on' if default else 'off'})"
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
            continue
        text += "" if default is None else f" (default: {default})"
        kind = next(kind for kind in (float, int, str) if kind.__name__ in str(setting.type))
        parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text)


def add_archive(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names an archive."""
    parser.add_argument("archive", help="folder of the archive")


def add_sample_flags(parser: argparse.ArgumentParser, *, batches: int) -> None:
    """Add the archive, the model, and the flags that choose a sample of the capture's batches.

    Args:
        parser: The parser of the job.
        batches: How many run unless the user says.
    """
    add_archive(parser)
    parser.add_argument("--model", required=True, help="hub id or folder of the model that was captured")
    parser.add_argument(
        "--batches", type=int, default=batches, metavar="INT", help=f"batches to run (default: {batches})"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="INT", help="seed of the choice of batches")
    parser.add_argument("--device", default="auto", metavar="STR", help="device of the model: auto, cpu, cuda, ...")


def run_sample(options: argparse.Namespace, job: Callable[..., Found], *, shown: bool, **more: Any) -> Found:
    """Call a job with what `add_sample_flags` added and with `more`, and show its progress, if it is to be shown."""
    with StepProgress("batch", shown=shown and not options.json) as progress:
        return job(
            options.archive,
            options.model,
            n_batches=options.batches,
            seed=options.seed,
            device=options.device,
            on_batch=progress.step,
            **more,
        )


def add_split_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that spread a model over processes that were launched together."""
    for flag, text in (
        ("--tp", "split the model over so many processes by tensor parallelism (transformers' plan)"),
        ("--pp", "split the model's blocks over so many processes, one stage each (transformers' pipeline)"),
    ):
        parser.add_argument(flag, type=int, default=1, metavar="INT", help=text)


def speaks_for_all() -> bool:
    """Say whether this process prints and shows progress; of those that a launcher started, the first does."""
    return os.environ.get("RANK", "0") == "0"


def default_folder(archive: Path, job: str, *asked: str | None) -> Path:
    """Return the folder, here, that a job's files go to unless another is named: ARCHIVE-JOB-WHAT.

    Args:
        archive: The archive; its name is used without ``.zarr``.
        job: The job's word.
        asked: What tells one run of the job from another; what is no plain word gets a digest as well.
    """
    name = archive.resolve().name.removesuffix(".zarr")
    return Path("-".join([name, job, *(_word(text) for text in asked if text)]))


def _word(text: str) -> str:
    plain = re.sub(r"\W+", "-", text).strip("-")[:40]
    return text if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where an analysis runs."""
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="a Dask scheduler, tcp://host:port; `inline` for this process alone; default: a local cluster",
    )
    parser.add_argument("--workers", type=int, metavar="INT", help="workers of the local cluster; default: its cores")
    parser.add_argument(
        "--memory-limit", default="4GiB", metavar="SIZE", help="memory of one worker of the local cluster (4GiB)"
    )


def cluster_of(options: argparse.Namespace) -> "AbstractContextManager[Cluster]":
    """Return the cluster that the flags ask for, to be used in a `with`."""
    from residua.analysis.support.cluster import connect

    return connect(
        options.scheduler, workers=options.workers, memory_limit=options.memory_limit, shown=not options.json
    )
