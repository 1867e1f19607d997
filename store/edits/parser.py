"""Parses edits from Python dictionaries, YAML or JSON. Untrusted input becomes an edit or an error.

Text that names files and folders stays inside the folder of the edit file, or is an address. A `Path` object may lead
anywhere, since only a Python caller can pass one; the same holds for functions.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from residua.store.base.canonical import canonical_json
from residua.store.base.errors import PlanError
from residua.store.base.untrusted import parse_yaml
from residua.store.edits.edit import KINDS, Align, Edit, Function
from residua.store.edits.places import Address, Place, place_of
from residua.store.edits.vectors import Vector, vector_of
from residua.store.read.archive import Archive
from residua.store.selection.tokens import Selection, parse_selection
from residua.store.selection.values import MAX_LIST, finite_number, is_list, text, whole_number
from residua.store.storage.address import is_remote
from residua.store.storage.mirror import fetched

MAX_EDITS = 1000
MAX_FILE_BYTES = 2**20  # as YAML this takes 350 times the memory, and 20 s

EditSource = str | PathLike[str] | Iterable[Edit | Mapping[str, Any]]
"""The path or address of a YAML or JSON file, or edits and dictionaries in order."""


def parse_edits(source: EditSource, *, folder: str | PathLike[str] | None = None) -> tuple[Edit, ...]:
    """Return the edits of `source`, in order.

    Args:
        source: A file with a list of edits, or with such a list under ``edits``, or its address; or edits and
            dictionaries.
        folder: Folder of the files that dictionaries name by text; the current folder by default. Files that a file
            names are in its own folder, or at addresses.

    Raises:
        PlanError: An entry is no edit; the message says which and why.

    Example:
        >>> parse_edits([{"edit": "scale", "site": "mlp_out.3", "by": 0.5, "positions": [-1]}])[0].chosen.positions
        (-1,)
    """
    if isinstance(source, str | PathLike):
        place = Address(fspath(source)) if is_remote(source) else Path(source)
        try:
            with fetched(source, most_bytes=MAX_FILE_BYTES) as path:
                found = _read(path)
        except FileNotFoundError as error:
            raise PlanError(f"there is no file of edits at {place}") from error
        folder_of: Place = Address(place.address.rpartition("/")[0]) if isinstance(place, Address) else place.parent
        return _parse_all(found, folder_of, trusted=False)
    return _parse_all(list(source), Path() if folder is None else Path(folder), trusted=True)


def _read(path: Path) -> list[Any]:
    if not path.is_file():
        raise PlanError(f"there is no file of edits at {path}")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise PlanError(f"{path} is over 1 MiB: put long vectors into .npy files in its folder, and name them")
    try:
        found = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlanError(f"{path} is neither YAML nor JSON: {error}") from error
    if isinstance(found, dict) and found.keys() == {"edits"}:
        found = found["edits"]
    if not isinstance(found, list):
        raise PlanError(f"{path} should hold a list of edits, found {type(found).__name__}")
    return found


def _parse_all(items: list[Any], folder: Place, *, trusted: bool) -> tuple[Edit, ...]:
    if len(items) > MAX_EDITS:
        raise PlanError(f"{len(items):,} edits were given: give at most {MAX_EDITS:,}")
    edits = []
    for number, item in enumerate(items, start=1):
        try:
            edit = item if isinstance(item, Edit) and trusted else _parse(item, _Fields(folder, trusted=trusted))
            _ = canonical_json(edit.to_json())
        except (PlanError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
            raise PlanError(f"edit {number}{_title(item)}: {error}") from error
        edits.append(edit)
    return tuple(edits)


def _title(item: object) -> str:
    if not isinstance(item, Mapping):
        return ""
    kind, site = item.get("edit"), item.get("site")
    shown = [text[:60] for text in (kind, site) if isinstance(text, str)]
    return f" ({' at '.join(shown)})" if shown else ""


def _parse(item: object, parser: "_Fields") -> Edit:
    if not isinstance(item, Mapping) or not all(isinstance(key, str) for key in item):
        raise PlanError(f"an edit is a mapping such as {{edit: zero, site: mlp_out.3}}, found {type(item).__name__}")
    name = item.get("edit")
    if not isinstance(name, str) or name not in KINDS:
        raise PlanError(f"there is no edit {str(name)[:60]!r}; there are {', '.join(KINDS)}")
    kind = KINDS[name]
    own = {entry.name: entry for entry in fields(kind) if entry.name not in ("sites", "chosen")}
    choice = [entry.name for entry in fields(Selection)]
    _refuse_unknown(item, name, ["edit", "site", *own, *choice])
    missing = [entry.name for entry in own.values() if entry.default is MISSING and entry.name not in item]
    if missing or "site" not in item:
        raise PlanError(f"{name} needs {' and '.join([*missing, *([] if 'site' in item else ['site'])])}")
    chosen = parse_selection(item)
    values = {key: parser.readers[key](key, item[key]) for key in own if item.get(key) is not None}
    return kind(sites=_sites(item["site"]), chosen=chosen, **values)


def _refuse_unknown(item: Mapping[str, Any], name: str, known: list[str]) -> None:
    unknown = [key for key in item if key not in known]
    if unknown:
        near = get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise PlanError(f"{name} knows no {unknown[0][:60]!r}: {hint}it takes {', '.join(known[2:])}")


def _sites(value: object) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not words or not all(isinstance(word, str) for word in words):
        raise PlanError(f"site is the name of a site or a list of names, found {str(value)[:60]!r}")
    if len(words) > MAX_EDITS or sum(len(word) for word in words) > MAX_FILE_BYTES:
        raise PlanError("site names too many sites: use patterns such as 'resid_post.*'")
    return tuple(words)


class _Fields:
    """Reads the fields of an edit that select no rows; a field is the same in every kind.

    Attributes:
        readers: From the name of a field to the function of (name, value) that reads it.
    """

    def __init__(self, folder: Place, *, trusted: bool) -> None:
        self._folder = folder
        self._trusted = trusted
        self.readers: dict[str, Callable[[str, Any], Any]] = {
            **dict.fromkeys(("scale", "by"), finite_number),
            "std": _spread,
            **dict.fromkeys(("archive", "lens"), self._place),
            "overlay": self._overlay,
            **dict.fromkeys(("vector", "directions"), lambda _name, value: vector_of(value, folder)),
            "column": text,
            "to": self._target,
            "seed": whole_number,
            "source": _source,
            "align": _align,
            "function": self._function,
        }

    def _target(self, name: str, value: object) -> Vector | float | str:
        if isinstance(value, str) and value == "stored":  # comparing an array would give an array
            return "stored"
        if isinstance(value, int | float) or getattr(value, "ndim", 1) == 0:
            return finite_number(name, value)
        return vector_of(value, self._folder)

    def _place(self, name: str, value: object) -> Place:
        if self._trusted and isinstance(value, Archive) and is_remote(value):
            return Address(fspath(value), {**(value.storage_options or {})})
        path = getattr(value, "path", value)  # of an open archive or overlay
        if isinstance(path, Path) and self._trusted:
            return path
        return place_of(text(name, value), self._folder)

    def _overlay(self, name: str, value: object) -> Path:
        place = self._place(name, value)
        if isinstance(place, Address):
            raise PlanError(f"{place} is an address, and an overlay is a folder of this machine: name that")
        return place

    def _function(self, name: str, value: object) -> Callable[..., Any]:
        if not self._trusted or not callable(value):
            raise PlanError(f"{name} is a Python function, which only Python code in this process can pass")
        return value


def _spread(name: str, value: object) -> float:
    found = finite_number(name, value)
    if found < 0:
        raise PlanError(f"{name} is {found}: the spread of noise is at least 0")
    return found


def _source(name: str, value: object) -> int | dict[int, int]:
    if not isinstance(value, Mapping):
        return whole_number(name, value)
    if not 0 < len(value) <= MAX_LIST:
        raise PlanError(f"{name} is an example, or gives one by example")
    return {_example(name, key): whole_number(name, item) for key, item in value.items()}


def _example(name: str, key: object) -> int:
    """Return the key of a mapping; JSON has turned it into text."""
    return int(key) if isinstance(key, str) and key.isdecimal() else whole_number(name, key)


def _align(name: str, value: object) -> Align:
    if isinstance(value, str) and value in ("start", "end"):
        return "start" if value == "start" else "end"
    pairs: Any = value if is_list(value) else ()
    if not pairs or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise PlanError(f"{name} is start, end, or a list of pairs [position here, position there]")
    found = tuple((whole_number(name, here), whole_number(name, there)) for here, there in pairs)
    if len({here for here, _ in found}) < len(found):
        raise PlanError(f"{name} gives a position two partners: give each one")
    return found


def is_reproducible(edits: Iterable[Edit]) -> bool:
    """Return whether the edits' JSON suffices to apply them again, which no Python function allows."""
    return not any(isinstance(edit, Function) for edit in edits)
