"""The command line: one command, one sub-command per job, each a thin wrapper over a public function.

Exit codes: 0 done, 1 the answer is no (`verify` found damage, the job failed), 2 the request itself was wrong,
130 stopped by the user.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from residua.pipelines.cli import archive as cli_archive
from residua.pipelines.cli import capture as cli_capture
from residua.pipelines.cli import fidelity as cli_fidelity
from residua.pipelines.cli import induction as cli_induction
from residua.pipelines.cli import lens as cli_lens
from residua.pipelines.cli import patch as cli_patch
from residua.pipelines.cli import probe as cli_probe
from residua.pipelines.cli import replay as cli_replay
from residua.pipelines.cli import stats as cli_stats
from residua.pipelines.cli import top as cli_top
from residua.pipelines.cli.job import Run
from residua.pipelines.cli.lists import with_negative_values
from residua.store.base.errors import AnalysisError, CaptureError, DamagedArchiveError, NotCapturedError, ResiduaError
from residua.store.base.extras import missing_package

JOBS = (
    cli_capture,
    cli_archive,
    cli_fidelity,
    cli_induction,
    cli_lens,
    cli_patch,
    cli_probe,
    cli_replay,
    cli_stats,
    cli_top,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(with_negative_values(words))
    options.command_line = " ".join(["residua", *words])
    run: Run = options.run
    try:
        return run(options)
    except AnalysisError as error:  # without a cause nothing failed: it was asked for what cannot be
        return _fail(options, error, 2 if error.__cause__ is None else 1)
    except (CaptureError, DamagedArchiveError, NotCapturedError) as error:
        return _fail(options, error, 1)
    except ModuleNotFoundError as error:
        explained = missing_package(error, f"residua {words[0]}")
        if explained is None:
            raise
        return _fail(options, explained, 2)
    except (ResiduaError, OSError, IndexError) as error:
        return _fail(options, error, 2)
    except KeyboardInterrupt:
        return _stopped(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="residua",
        allow_abbrev=False,
        description="Capture, store, read, analyse and replay the activations of transformer models.",
    )
    parser.add_argument("--version", action="version", version=f"residua {version('residua')}")
    jobs = parser.add_subparsers(title="jobs", required=True, metavar="JOB")
    for job in JOBS:
        job.add(jobs)
    return parser


def _fail(options: argparse.Namespace, error: Exception, code: int) -> int:
    if options.json:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
    else:
        print(f"residua: {error}", file=sys.stderr)
    return code


def _stopped(options: argparse.Namespace) -> int:
    """Say what is safe of the archive that a job was writing."""
    from residua.store.format.archive_metadata import is_archive
    from residua.store.read.archive import Archive

    rows, total = 0, None
    out: str | None = getattr(options, "out", None)
    if out is not None and is_archive(Path(out)):
        rows, total, *_ = Archive(out).progress
    of = "" if total is None else f" of {total:,}"
    message = getattr(options, "when_stopped", "stopped")
    if out is not None and "when_stopped" not in options:
        message = f"stopped: {rows:,}{of} rows are captured and safe. Run the same command again to go on."
    print(json.dumps({"stopped": True, "rows": rows, "total_rows": total}) if options.json else f"residua: {message}")
    return 130
