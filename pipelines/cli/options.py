"""What the commands share: how a command is added, flags that several commands have, and lists as values."""

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import Field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from residua.pipelines.cli.progress import StepProgress
from residua.pipelines.setup.capture_settings import DEVICE_HELP, PP_HELP, TP_HELP
from residua.store.base.errors import PlanError
from residua.store.base.naming import flag_of
from residua.store.selection.grammar import is_number_or_range, parse_numbers
from residua.store.storage.address import is_remote

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from residua.analysis.support.cluster import Cluster
    from residua.store.read.archive import Archive

Found = TypeVar("Found")
Run = Callable[[argparse.Namespace], int]
WHERE_HELP = "use only rows that meet this condition, for example 'position > 0' (default: all rows)"
MODEL_HELP = "hub id or folder of the model"
CAPTURED_MODEL_HELP = "hub id or folder of the model that was captured"

MANY_PASSES = 16  # what probes, lenses and scores of heads do, in passes over their rows
_SMALL_BYTES = 64 * 2**20  # that an analysis reads in a few seconds; starting workers takes about ten
_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*")\s*,|([^,]*),')  # a JSON string, or anything without a comma
_KINDS = {float: "float", str: "str|Literal", int: "int"}  # of a flag, by the type of its field
_FLAG, _NEGATIVE = re.compile(r"--[^=]+"), re.compile(r"-\d")


def add_command(commands: Any, name: str, run: Run, text: str, description: str) -> argparse.ArgumentParser:
    """Add a command.

    Args:
        commands: What ``add_subparsers`` returned.
        name: Its word on the command line.
        run: Does the work and returns the exit code.
        text: One line for the list of commands.
        description: What the command reads, does and writes.
    """
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=description, allow_abbrev=False)
    add_switch(parser, "--json", "print one JSON object instead of text")
    add_switch(parser, "--quiet", "show no progress")
    parser.set_defaults(run=run)
    return parser


def add_flag(
    parser: argparse._ActionsContainer, flag: str, text: str, default: Any = None, *, kind: type = str, **more: Any
) -> None:
    """Add a flag with one value.

    Args:
        parser: The parser.
        flag: The flag.
        text: Its help, with the default in words if `default` is None.
        default: Its default; the help shows it, and it decides the type of the value unless it is None.
        kind: The type of the value if `default` is None.
        more: As for ``add_argument``.
    """
    if default is not None:
        kind, text = type(default), f"{text} (default: {default})"
    parser.add_argument(flag, **{"metavar": kind.__name__.upper(), **more}, type=kind, default=default, help=text)


def add_switch(parser: argparse._ActionsContainer, flag: str, text: str, off: str = "off") -> None:
    """Add a flag without a value, which is off by default; `off` says in words what happens without it."""
    parser.add_argument(flag, action="store_true", help=f"{text} (default: {off})")


def add_settings(parser: argparse._ActionsContainer, settings: Iterable[Field[Any]]) -> None:
    """Add a flag for each field of a settings class, with the help of its metadata and its default.

    A flag that is not given is None, so that a settings file or the class's own default applies.
    """
    for setting in settings:
        name, text, default, values = setting.name, setting.metadata["help"], setting.default, str(setting.type)
        if "bool" in values:
            text += "" if default is None else f" (default: {'on' if default else 'off'})"
            parser.add_argument(
                flag_of(name), action=argparse.BooleanOptionalAction, default=None, help=text, dest=name
            )
        else:
            kind = next(kind for kind, words in _KINDS.items() if re.search(words, values))
            text += "" if default is None else f" (default: {default})"
            add_flag(parser, flag_of(name), text, kind=kind, dest=name)


def given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Return the settings among `names` whose flags were given, with their values."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def add_archive(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names an archive."""
    parser.add_argument("archive", help="folder of the archive, or its address (s3://, gs://, az://, https://, hf://)")


def add_results(parser: argparse.ArgumentParser, what: str, default: str | None) -> None:
    """Add the flag that says where a command writes its files; `folder` has its value.

    Args:
        parser: The parser of the command.
        what: What the place is for, such as ``the files``.
        default: Where they go without it, as text; None if it has to be given.
    """
    text = f"folder for {what}, or its address in a bucket"
    if default is not None:
        text += f" (default: {default})"
    add_flag(parser, "--out", text, dest="folder", metavar="FOLDER", required=default is None)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the flag for the device of the model."""
    add_flag(parser, "--device", DEVICE_HELP, "auto")


def add_sample_flags(parser: argparse.ArgumentParser, *, batches: int) -> None:
    """Add the archive, the model, and the flags that choose a sample of the capture's batches.

    Args:
        parser: The parser of the command.
        batches: How many batches run by default.
    """
    add_archive(parser)
    parser.add_argument("--model", required=True, help=CAPTURED_MODEL_HELP)
    add_flag(parser, "--batches", "number of batches to run", batches)
    add_flag(parser, "--seed", "seed of the random choice of batches", 0)
    add_device(parser)


def shows_progress(options: argparse.Namespace) -> bool:
    """Return whether a command draws its progress: for a person who looks, not into a file or a pipe."""
    return not options.json and not options.quiet and sys.stderr.isatty()


def run_sample(options: argparse.Namespace, job: Callable[..., Found], *, shown: bool, **more: Any) -> Found:
    """Call a job with the flags of `add_sample_flags` and with `more`; show its progress if `shown`."""
    with StepProgress("batch", shown=shown and shows_progress(options)) as progress:
        return job(
            options.model,
            options.archive,
            n_batches=options.batches,
            seed=options.seed,
            device=options.device,
            on_batch=progress.step,
            **more,
        )


def add_parallel_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that split a model over processes that were launched together."""
    add_flag(parser, "--tp", TP_HELP, 1)
    add_flag(parser, "--pp", PP_HELP, 1)


def is_first_process() -> bool:
    """Return whether this process prints and shows progress: the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def default_folder(place: str | Path, command: str, *asked: str | None) -> Path:
    """Return the default folder for a command's files, ARCHIVE-COMMAND-WHAT in the working directory.

    Args:
        place: Folder or address of the archive; its name is used without ``.zarr``.
        command: The command's word.
        asked: Values of flags that tell one run from another. A value that is not a plain word also gets a digest.
    """
    path = Path(place)
    name = (path if is_remote(place) else path.resolve()).name.removesuffix(".zarr")
    return Path("-".join([name, command, *(_word(text) for text in asked if text)]))


def _word(text: str) -> str:
    plain = re.sub(r"\W+", "-", text).strip("-")[:40]
    return text if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def add_cluster_flags(
    parser: argparse.ArgumentParser,
    default: str = "a local cluster; for little data this process, unless --workers is given",
) -> None:
    """Add the flags that say where an analysis runs.

    Args:
        parser: The parser of the command.
        default: Where it runs without them.
    """
    text = f"address of a Dask scheduler, tcp://host:port, or 'inline' for this process alone (default: {default})"
    add_flag(parser, "--scheduler", text, metavar="ADDRESS")
    add_flag(parser, "--workers", "workers of the local cluster (default: one a core, as memory allows)", kind=int)
    add_flag(parser, "--memory-limit", "memory of each worker of the local cluster", "4GiB", metavar="SIZE")


def cluster_of(
    options: argparse.Namespace,
    archive: "Archive | None" = None,
    sites: str | None = None,
    *,
    passes: int = 1,
    shows: bool = True,
) -> "AbstractContextManager[Cluster]":
    """Return the cluster that the flags ask for, as a context manager; by default this process for little data.

    Args:
        options: The flags.
        archive: The archive that is read; None: workers are needed in any case.
        sites: Its sites that are read; None for all.
        passes: How often they are read, or how many times the work of reading them is.
        shows: Whether the cluster draws bars of its own.
    """
    from residua.analysis.support.cluster import INLINE, connect

    scheduler = options.scheduler
    is_open = scheduler is None and options.workers is None
    if is_open and archive is not None and passes * _read_bytes(archive, sites) <= _SMALL_BYTES:
        scheduler = INLINE
    shown = shows and shows_progress(options)
    return connect(scheduler, workers=options.workers, memory_limit=options.memory_limit, shown=shown)


def _read_bytes(archive: "Archive", sites: str | None) -> int:
    """Return the bytes of all rows of some sites of an archive, or of the archives of its stacks."""
    from residua.store.read.stacks import archives_of

    chosen = set(archive.sites if sites is None else archive.select(sites))
    return sum(
        one.n_rows * sum(site.row_bytes for site in one.plan.sites if site.name in chosen)
        for one in archives_of(archive)
    )


def parse_tokens(text: str, flag: str) -> list[int | str]:
    """Return the tokens of a list such as ``17,40-44, the,"7"``: numbers are ids, anything else is a text.

    A text with commas or digits only is written in double quotes, as in JSON.

    Raises:
        PlanError: A text is empty, or its quotes are not those of JSON.
    """
    found: list[int | str] = []
    for item in _TOKEN.finditer(text + ","):
        quoted, plain = item.groups()
        if quoted is not None:
            try:
                found.append(str(json.loads(quoted)))
            except ValueError as error:
                raise PlanError(f"{flag} {quoted[:60]}: this is not a text in double quotes ({error})") from error
        elif is_number_or_range(plain):
            found += parse_numbers(plain, flag)
        elif not plain:
            raise PlanError(f"{flag} {text[:60]!r}: a token between commas is empty; give ids, or texts")
        else:
            found.append(plain)
    return found


def bind_negative_values(words: Sequence[str]) -> list[str]:
    """Join each value such as ``-3,-1`` to the flag before it; argparse would take the value for a flag."""
    bound: list[str] = []
    for word in words:
        if _NEGATIVE.match(word) and bound and _FLAG.fullmatch(bound[-1]):
            bound[-1] += f"={word}"
        else:
            bound.append(word)
    return bound
