"""From Python dictionaries, YAML or JSON to edits, checked: whatever a stranger sends is an edit or an error.

Text that names files and folders stays inside the folder of the edit file. A `Path` object is the caller's own word
and may lead anywhere; so may a function, which only a Python caller can hand over.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any

from residua.store.base.canonical import canonical_json
from residua.store.base.errors import PlanError
from residua.store.base.untrusted import parse_yaml
from residua.store.edits.edit import KINDS, Align, Chosen, Edit, Function, Scalar
from residua.store.edits.vectors import Vector, inside, vector_of

MAX_EDITS = 1000
MAX_LIST = 1_000_000
MAX_FILE_BYTES = 2**20  # as YAML it takes 350 times that in memory, and 20 s
_LARGEST = 2**48

EditSource = str | PathLike[str] | Iterable[Edit | Mapping[str, Any]]
"""The path of a YAML or JSON file, or edits and dictionaries in order."""


def parse_edits(source: EditSource, *, folder: str | PathLike[str] | None = None) -> tuple[Edit, ...]:
    """Return the edits that `source` spells, in order.

    Args:
        source: A file with a list of edits, or with such a list under ``edits``; or edits and dictionaries.
        folder: Where files lie that dictionaries name by text; the current folder unless given. Files that a file
            names lie beside it.

    Raises:
        PlanError: Something in it is no edit; the message says which and why.

    Example:
        >>> parse_edits([{"edit": "scale", "site": "mlp_out.3", "by": 0.5, "positions": [-1]}])[0].chosen.positions
        (-1,)
    """
    if isinstance(source, str | PathLike):
        path = Path(source)
        return _parse_all(_read(path), path.parent, trusted=False)
    return _parse_all(list(source), Path() if folder is None else Path(folder), trusted=True)


def _read(path: Path) -> list[Any]:
    if not path.is_file():
        raise PlanError(f"there is no file of edits at {path}")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise PlanError(f"{path} is over 1 MiB: put long vectors into .npy files beside it and name them")
    try:
        found = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlanError(f"{path} is neither YAML nor JSON: {error}") from error
    if isinstance(found, dict) and found.keys() == {"edits"}:
        found = found["edits"]
    if not isinstance(found, list):
        raise PlanError(f"{path} should hold a list of edits, found {type(found).__name__}")
    return found


def _parse_all(items: list[Any], folder: Path, *, trusted: bool) -> tuple[Edit, ...]:
    if len(items) > MAX_EDITS:
        raise PlanError(f"{len(items):,} edits were given; at most {MAX_EDITS:,} are taken")
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
    choice = [entry.name for entry in fields(Chosen)]
    _refuse_unknown(item, name, ["edit", "site", *own, *choice])
    missing = [entry.name for entry in own.values() if entry.default is MISSING and entry.name not in item]
    if missing or "site" not in item:
        raise PlanError(f"{name} needs {' and '.join([*missing, *([] if 'site' in item else ['site'])])}")
    chosen = Chosen(**{key: parser.value(key, item[key]) for key in choice if item.get(key) is not None})
    values = {key: parser.value(key, item[key]) for key in own if key in item and item[key] is not None}
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
        raise PlanError("site names too many sites: patterns such as 'resid_post.*' name several")
    return tuple(words)


class _Fields:
    """Reads the value of each field; a field means the same in every edit."""

    def __init__(self, folder: Path, *, trusted: bool) -> None:
        self._folder = folder
        self._trusted = trusted
        counts = dict.fromkeys(("examples", "rows", "tokens", "heads", "channels"), _counts)
        self._readers: dict[str, Callable[[str, Any], Any]] = {
            **counts,
            **dict.fromkeys(("scale", "by", "std"), _number),
            **dict.fromkeys(("archive", "lens", "overlay"), self._place),
            **dict.fromkeys(("vector", "directions"), self._vector),
            "positions": _positions,
            "where": _where,
            "column": _text,
            "to": self._target,
            "seed": _count,
            "source": _source,
            "align": _align,
            "function": self._function,
        }

    def value(self, name: str, value: object) -> Any:
        """Return the value of field `name`."""
        return self._readers[name](name, value)

    def _vector(self, _name: str, value: object) -> Vector:
        return vector_of(value, self._folder)

    def _target(self, name: str, value: object) -> Vector | float | str:
        if isinstance(value, str) and value == "stored":  # an array compares each of its numbers
            return "stored"
        if isinstance(value, int | float) or getattr(value, "ndim", 1) == 0:
            return _number(name, value)
        return vector_of(value, self._folder)

    def _place(self, name: str, value: object) -> Path:
        if isinstance(value, Path) and self._trusted:
            return value
        return inside(_text(name, value), self._folder)

    def _function(self, name: str, value: object) -> Callable[..., Any]:
        if not self._trusted or not callable(value):
            raise PlanError(f"{name} is a Python function, which only Python code in this process can hand over")
        return value


def _plain(value: Any) -> Any:
    """Return numbers and lists of them in place of what numpy, torch or pandas hold them in."""
    return value.tolist() if hasattr(value, "tolist") else value


def _number(name: str, value: object) -> float:
    largest = sys.float_info.max
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -largest <= value <= largest:
        raise PlanError(f"{name} is a finite number, found {str(value)[:60]!r}")
    if name == "std" and value < 0:
        raise PlanError(f"std is {value}: the spread of noise is at least 0")
    return float(value)


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < _LARGEST


def _count(name: str, value: object) -> int:
    value = _plain(value)
    if not isinstance(value, int) or not _is_int(value, 0):
        raise PlanError(f"{name} is a whole number from 0 on, found {str(value)[:60]!r}")
    return value


def _list(name: str, value: Any) -> Sequence[Any]:
    found = _plain(value)
    if isinstance(found, int):
        found = [found]
    if not isinstance(found, list | tuple | range) or not 0 < len(found) <= MAX_LIST:
        raise PlanError(f"{name} is a list of whole numbers, found {str(value)[:60]!r}")
    return [_plain(item) for item in found]


def _counts(name: str, value: object) -> tuple[int, ...]:
    return tuple(_count(name, item) for item in _list(name, value))


def _positions(name: str, value: object) -> tuple[int, ...] | slice:
    if isinstance(value, str):
        parts = value.split(":")
        try:
            start, stop = (int(part) if part.strip() else None for part in parts)
        except ValueError as error:
            raise PlanError(f"{name} {value[:60]!r} is no slice such as '-3:' or '5:10'") from error
        return slice(start, stop)
    found = _list(name, value)
    if not all(_is_int(item, -_LARGEST) for item in found):
        raise PlanError(f"{name} are whole numbers, negative ones from the end, found {str(value)[:60]!r}")
    return tuple(found)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 4096:
        raise PlanError(f"{name} is a text, found {str(value)[:60]!r}")
    return value


def _where(name: str, value: object) -> dict[str, tuple[Scalar, ...]]:
    if not isinstance(value, Mapping) or not value or len(value) > MAX_EDITS:
        raise PlanError(f"{name} gives values by column, such as {{label: python}}, found {str(value)[:60]!r}")
    found = {}
    for column, values in value.items():
        listed = values if isinstance(values, list | tuple) else [values]
        if not all(isinstance(item, str | int | float | bool | None) for item in listed) or len(listed) > MAX_LIST:
            raise PlanError(f"{name}: the values of {column!r} are plain texts or numbers")
        found[_text(name, column)] = tuple(listed)
    return found


def _source(name: str, value: object) -> int | dict[int, int]:
    if not isinstance(value, Mapping):
        return _count(name, value)
    if not 0 < len(value) <= MAX_LIST:
        raise PlanError(f"{name} is an example, or gives one by example")
    return {_example(name, key): _count(name, item) for key, item in value.items()}


def _example(name: str, key: object) -> int:
    """Return the key of a mapping, which JSON makes a text."""
    return int(key) if isinstance(key, str) and key.isdecimal() else _count(name, key)


def _align(name: str, value: object) -> Align:
    if isinstance(value, str) and value in ("start", "end"):
        return "start" if value == "start" else "end"
    pairs: Sequence[Any] = value if isinstance(value, list | tuple) and 0 < len(value) <= MAX_LIST else ()
    if not pairs or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise PlanError(f"{name} is start, end, or a list of pairs [position here, position there]")
    found = tuple((_count(name, here), _count(name, there)) for here, there in pairs)
    if len({here for here, _ in found}) < len(found):
        raise PlanError(f"{name} gives a position two partners; each has one")
    return found


def is_reproducible(edits: Iterable[Edit]) -> bool:
    """Say whether the edits' JSON is all that one needs to apply them again: no function is among them."""
    return not any(isinstance(edit, Function) for edit in edits)
