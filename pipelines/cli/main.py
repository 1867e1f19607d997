"""The command line: one program, one command per job, each a thin wrapper over a public function.

Exit codes: 0 the job is done; 1 the job failed, or the answer is no (`verify` found damage); 2 the request itself was
wrong; 130 the user stopped the job.
"""

import argparse
import gc
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path

from residua.pipelines.cli import archive, capture, heads, lens, patch, probe, replay, stats, top
from residua.pipelines.cli.options import Run, bind_negative_values, shows_progress
from residua.store.base.errors import (
    AnalysisError,
    CaptureError,
    DamagedArchiveError,
    NotCapturedError,
    ResiduaError,
    StorageError,
)
from residua.store.base.extras import missing_package
from residua.store.base.naming import naming_flags

_BAR_SWITCHES = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")  # transformers obeys the first
_COLLECTED_AFTER = 50_000
"""New objects after which Python looks for garbage; with its own 700, it looks through torch as that is imported."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    if arguments is None:  # the process is this command's own
        gc.set_threshold(_COLLECTED_AFTER)
    parser = _parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(bind_negative_values(words))
    options.command_line = " ".join(["residua", *words])
    with naming_flags(), nullcontext() if shows_progress(options) else _without_bars_of_libraries():
        return _run(options, words[0])


@contextmanager
def _without_bars_of_libraries() -> Iterator[None]:
    """Let the libraries that load models and datasets draw no bars of their own, if they are imported inside."""
    before = {name: os.environ.get(name) for name in _BAR_SWITCHES}
    os.environ.update(dict.fromkeys(_BAR_SWITCHES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _run(options: argparse.Namespace, command: str) -> int:
    run: Run = options.run
    try:
        code = run(options)
        sys.stdout.flush()  # now, while an end of the pipe can be noticed
    except BrokenPipeError:  # whoever reads has seen enough, as in `residua top ... | head`
        with suppress(OSError):  # or the interpreter tries again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except AnalysisError as error:  # without a cause nothing failed: the request cannot be met
        return _fail(options, error, 2 if error.__cause__ is None else 1)
    except (CaptureError, DamagedArchiveError, NotCapturedError, StorageError) as error:
        return _fail(options, error, 1)
    except ModuleNotFoundError as error:
        explained = missing_package(error, f"residua {command}")
        if explained is None:
            raise
        return _fail(options, explained, 2)
    except (ResiduaError, OSError, IndexError) as error:
        return _fail(options, error, 2)
    except KeyboardInterrupt:
        return _stopped(options)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="residua",
        allow_abbrev=False,
        description="Capture, store, read, analyse and replay the activations of transformer models.",
        epilog="residua COMMAND --help explains the flags of a command.",
    )
    parser.add_argument("--version", action="version", version=f"residua {version('residua')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (capture, archive, stats, probe, top, heads, lens, replay, patch):
        module.add(commands)
    return parser


def _fail(options: argparse.Namespace, error: Exception, code: int) -> int:
    if options.json:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
    else:
        print(f"residua: {error}", file=sys.stderr)
    return code


def _stopped(options: argparse.Namespace) -> int:
    """Print what is safe of the archive that a job was writing."""
    from residua.store.format.archive_metadata import is_archive
    from residua.store.read.stacks import open_archive

    rows, total = 0, None
    out: str | None = getattr(options, "out", None)
    if out is not None and is_archive(Path(out)):
        rows, total, *_ = open_archive(out).progress
    of = "" if total is None else f" of {total:,}"
    message = getattr(options, "when_stopped", "stopped")
    if out is not None and "when_stopped" not in options:
        message = f"stopped: {rows:,}{of} rows are captured and safe. Run the same command again to go on."
    print(json.dumps({"stopped": True, "rows": rows, "total_rows": total}) if options.json else f"residua: {message}")
    return 130
