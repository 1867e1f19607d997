"""The card of an archive: the README.md of its repository, for people and for the Hub's viewer and `load_dataset`.

Everything in it follows from the archive, except for licences, which are asked for and never guessed: where none is
given, the card says so. Its last line has a digest of what stands before it. A card whose digest does not fit was
edited by somebody, and is not written over.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from residua.store.base.errors import PlanError
from residua.store.base.naming import named
from residua.store.base.untrusted import read_file
from residua.store.examples.index import OWN_COLUMNS
from residua.store.format.archive_metadata import said_of
from residua.store.read.archive import Archive
from residua.store.read.stacks import open_archive
from residua.store.read.summary import Summary, summarise
from residua.store.sharing.croissant import CROISSANT, croissant
from residua.store.storage.address import HubPlace, hub_place, is_remote, shown
from residua.store.storage.files import write_file
from residua.store.storage.hub import hub_endpoint

CARD = "README.md"
MAX_CARD_BYTES = 4 * 2**20

_UNKNOWN = HubPlace("ORG/NAME", "main", "")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_STAMP = re.compile(r"<!-- residua card ([0-9a-f]{64}) -->\n?")
_MOST_NOTES = 50
_SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000)


@dataclass(frozen=True, kw_only=True)
class Licences:
    """The licences that a card names, as identifiers of the Hub such as ``cc-by-4.0``; None for one that nobody said.

    Attributes:
        data: Of the activations.
        model: Of the model.
        text: Of the text.

    Raises:
        PlanError: One is not such an identifier.
    """

    data: str | None = None
    model: str | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("license", self.data), ("model_license", self.model), ("text_license", self.text)):
            if value is not None and not _LICENCE.fullmatch(value):
                raise PlanError(
                    f"{named(name, value)} is not an identifier of a licence: write one that the Hub knows, such as "
                    "cc-by-4.0, apache-2.0 or other (https://huggingface.co/docs/hub/repositories-licenses)"
                )


@dataclass(frozen=True)
class Card:
    """The two files that describe an archive.

    Attributes:
        text: The README.md.
        croissant: The croissant.json.
    """

    text: str
    croissant: bytes


def make_card(
    archive: Archive, place: HubPlace = _UNKNOWN, licences: Licences | None = None, *, there: bytes = b""
) -> Card:
    """Return the card of an archive.

    Args:
        archive: The archive.
        place: Where it is, or will be.
        licences: What is known of them.
        there: The croissant.json that was published there before; its date is kept.
    """
    summary, columns = summarise(archive), archive.example_table.column_types()
    licences = licences or Licences()
    text = _stamped("\n".join([*_front(summary, place, licences), "", *_body(archive, summary, place, licences)]))
    described = croissant(
        summary,
        columns,
        place,
        endpoint=hub_endpoint({}),
        title=_title(summary),
        license=licences.data,
        date=datetime.now(tz=UTC).date().isoformat(),
        there=there,
    )
    return Card(text, described)


def card_of(
    archive: Archive | str | PathLike[str], *, address: str | None = None, licences: Licences | None = None
) -> Card:
    """Return the card of an archive.

    Args:
        archive: The archive, or its folder or address.
        address: The repository of the Hub for which it is; else the card has ORG/NAME in its place.
        licences: What is known of them.

    Raises:
        PlanError: It has several stacks, each of which has a card of its own.
        StorageError: `address` is not one of the Hub.
    """
    return make_card(open_archive(archive), _UNKNOWN if address is None else hub_place(address), licences)


def write_card(
    archive: str | PathLike[str],
    *,
    address: str | None = None,
    licences: Licences | None = None,
    force: bool = False,
) -> Path:
    """Write the card of an archive into its folder, as README.md and croissant.json.

    Args:
        archive: Folder of the archive.
        address: As for `card_of`.
        licences: As for `card_of`.
        force: Write over a README.md that somebody edited.

    Returns:
        The README.md.

    Raises:
        FileExistsError: There is a README.md that somebody wrote or edited.
        PlanError: It has several stacks, each of which has a card of its own; or it is at an address.
        StorageError: `address` is not one of the Hub.
    """
    if is_remote(archive):
        raise PlanError(f"{shown(archive)} is not a folder of this machine: print the card, and keep it where you like")
    folder = Path(archive)
    card = card_of(folder, address=address, licences=licences)
    path = folder / CARD
    there = read_file(folder, path, MAX_CARD_BYTES).decode(errors="replace") if path.exists() else ""
    if there and not force and not is_own(there):
        raise FileExistsError(
            f"{path} was written or edited by somebody, and is not written over: move it away, or say "
            f"{named('force', True)}"
        )
    write_file(folder / CROISSANT, [card.croissant])
    write_file(path, [card.text.encode()])
    return path


def is_own(text: str) -> bool:
    """Say whether a README.md is a card as it was made, which nobody has edited since."""
    lines = text.replace("\r\n", "\n").rstrip("\n").rsplit("\n", 1)
    found = _STAMP.fullmatch(lines[-1])
    return found is not None and len(lines) == 2 and found[1] == _digest(lines[0])


def _stamped(text: str) -> str:
    return f"{text}\n<!-- residua card {_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()


def _front(summary: Summary, place: HubPlace, licences: Licences) -> Iterator[str]:
    """Yield the YAML that the Hub reads; what nobody said is a comment to fill in."""
    prefix = f"{place.folder}/" if place.folder else ""
    model, commit = _model(summary)
    values: dict[str, Any] = {
        "pretty_name": _title(summary),
        "tags": ["residua", "activations", "interpretability", "zarr"],
        "size_categories": [_size(summary.n_examples)],
        "configs": [
            {
                "config_name": "examples",
                "default": True,
                "data_files": [{"split": "train", "path": f"{prefix}examples/*.parquet"}],
            }
        ],
    }
    if licences.data is not None:
        values = {"license": licences.data, **values}
    if commit:
        values["base_model"] = [model]
    yield "---"
    yield from yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000).splitlines()
    if licences.data is None:
        yield "# license: fill in, an identifier such as cc-by-4.0"
    if not commit:
        yield "# base_model: fill in, ORG/NAME of the model on the Hub; it was not loaded from there"
    yield "---"


def _body(archive: Archive, summary: Summary, place: HubPlace, licences: Licences) -> Iterator[str]:
    address, (model, commit) = place.address, _model(summary)
    site = summary.sites[0]
    yield f"# {_title(summary)}"
    yield ""
    yield (
        f"{summary.rows:,} rows of activations, one for each kept token of {summary.n_examples:,} examples, at "
        f"{len(summary.sites):,} sites of the model. They are stored without loss unless the table says otherwise. "
        "Every chunk has a checksum, and every row knows its token, its position and its example."
    )
    yield from _code("Open it", "python", _opening(address, site.name, site.shape, site.dtype))
    yield ""
    yield "The examples are a table, which the viewer of the Hub shows:"
    yield from _fenced("python", _loading(place))
    yield ""
    yield "Without Residua, `zarr.open_group` opens the arrays: this is a Zarr v3 hierarchy."
    yield from _contents(summary)
    yield from _code("Verify it", "console", [f"$ residua verify {address}    # reads every byte again"])
    yield from _reproducing(archive, address, model if commit else "MODEL")
    yield from _licences(licences)
    yield from _origin(summary)


def _opening(address: str, site: str, shape: tuple[int, ...], dtype: str) -> list[str]:
    rows = min(1000, shape[0])
    return [
        "import residua  # pip install residua",
        "",
        f'archive = residua.open("{address}")',
        f'rows = archive["{site}"][:{rows}]  # {(rows, *shape[1:])}, stored as {dtype}',
        f"tokens, examples = archive.rows.token[:{rows}], archive.rows.example[:{rows}]",
    ]


def _loading(place: HubPlace) -> list[str]:
    return [
        "from datasets import load_dataset",
        "",
        f'examples = load_dataset("{place.repository}", "examples", split="train")',
    ]


def _contents(summary: Summary) -> Iterator[str]:
    yield from (
        "",
        "## What was captured",
        "",
        "| site | shape | type | codec | bytes | rounding |",
        "| --- " * 6 + "|",
    )
    for site in summary.sites:
        error = site.relative_rms_error
        rounding = "none" if error is None else f"{error:.1e}, relative RMS"
        if site.cast_from is not None:
            rounding = f"{'' if error is None else rounding + '; '}cast from {site.cast_from}"
        shape = " x ".join(f"{size:,}" for size in site.shape)
        yield f"| `{_cell(site.name)}` | {shape} | {site.dtype} | {site.codec} | {site.stored_bytes:,} | {rounding} |"
    yield ""
    columns = ", ".join(f"`{_cell(name)}`" for name in (*OWN_COLUMNS, *summary.columns))
    yield (
        f"{summary.stored_bytes:,} bytes in {summary.shards:,} shards of {summary.rows_per_shard:,} rows. The columns "
        f"of the examples are {columns}. Row *r* of every site is the same token: `rows/token`, `rows/position` and "
        "`rows/example` say which."
    )
    for note in summary.notes[:_MOST_NOTES]:
        yield f"\n> {_cell(note)}"


def _reproducing(archive: Archive, address: str, model: str) -> Iterator[str]:
    yield from ("", "## Reproduce it", "")
    if not archive.plan.batch_tokens or "replay" in archive.plan.rules:
        yield "These rows do not come from batches that can be run again: the provenance says where they are from."
        return
    yield "A sample of the batches is run through the model again, and every row is compared with the stored one:"
    yield from _fenced("console", [f"$ residua reproduce {address} --model {model} --batches 4"])


def _licences(licences: Licences) -> Iterator[str]:
    unknown = "not said: ask the publisher"
    yield from ("", "## Licences", "", "| of | licence |", "| --- | --- |")
    for what, value in (("the activations", licences.data), ("the model", licences.model), ("the text", licences.text)):
        yield f"| {what} | {value or unknown} |"


def _origin(summary: Summary) -> Iterator[str]:
    """Yield where the rows are from; of paths, the last part alone."""
    yield from ("", "## Provenance", "", f"- plan: `{summary.digest}`")
    model, dataset = (said_of(what, summary.provenance) for what in ("model", "dataset"))
    if model:
        name, commit = _model(summary)
        yield f"- model: {_cell(name)}" + (f", commit {commit}" if commit else "")
        for key in ("class", "weights", "config", "dtype", "attention", "layout"):
            if model.get(key):
                yield f"- {key} of the model: {_cell(model[key])}"
    if dataset:
        yield f"- dataset: {_dataset(summary)}"
        for key in ("subset", "split", "revision"):
            if dataset.get(key):
                yield f"- {key} of the dataset: {_cell(dataset[key])}"
    if packages := said_of("packages", summary.provenance):
        yield f"- packages: {', '.join(f'{_cell(name)} {_cell(number)}' for name, number in packages.items())}"


def _title(summary: Summary) -> str:
    return f"Activations of {_cell(_model(summary)[0])} on {_dataset(summary)}"


def _model(summary: Summary) -> tuple[str, str]:
    """Return the name of the model and its commit on the Hub; the commit is empty if it did not come from there."""
    model = said_of("model", summary.provenance)
    name, commit = str(model.get("id") or ""), str(model.get("revision") or "")
    if _COMMIT.fullmatch(commit) and name.count("/") == 1 and not name.startswith(("/", ".")):
        return name, commit
    return PurePosixPath(name).name or str(model.get("class") or "a model"), ""


def _dataset(summary: Summary) -> str:
    dataset = said_of("dataset", summary.provenance)
    if dataset.get("kind") == "hub":
        return _cell(dataset.get("id"))
    return _cell(PurePosixPath(str(dataset.get("path") or "")).name or "a dataset of its author's")


def _size(n: int) -> str:
    """Return the class of sizes that the Hub has for `n` examples."""
    names = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B"]
    return names[sum(n >= size for size in _SIZES)]


def _cell(value: object) -> str:
    """Return a value in one line that Markdown takes as it is."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return re.sub(r"([|`<>\[\]])", r"\\\1", text)


def _code(title: str, language: str, lines: list[str]) -> Iterator[str]:
    yield from ("", f"## {title}")
    yield from _fenced(language, lines)


def _fenced(language: str, lines: list[str]) -> Iterator[str]:
    yield from ("", f"```{language}", *lines, "```")
