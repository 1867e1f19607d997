"""What the sub-commands share: how a job is added to the command line, and the flags of a cluster."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from residua.analysis.cluster import Cluster

Run = Callable[[argparse.Namespace], int]


def add_job(jobs: Any, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    """Add a sub-command.

    Args:
        jobs: What ``add_subparsers`` returned.
        name: Its word on the command line.
        run: Does the job and returns the exit code.
        text: One line of help.
    """
    parser: argparse.ArgumentParser = jobs.add_parser(name, help=text, description=text)
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    parser.set_defaults(run=run)
    return parser


def add_archive(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names an archive."""
    parser.add_argument("archive", help="folder of the archive")


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
    from residua.analysis.cluster import connect

    return connect(
        options.scheduler, workers=options.workers, memory_limit=options.memory_limit, shown=not options.json
    )
