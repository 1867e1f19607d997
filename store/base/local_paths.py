"""Paths of one machine in what an archive says of its origin: a copy that goes elsewhere names their last part alone.

They tell nobody where anything is, and often name a person. Model, tokenizer and data are known by their digests.
"""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from residua.store.base.errors import few
from residua.store.base.naming import named

_ABSOLUTE = r"(?:/|~[\w.-]*/|[A-Za-z]:[\\/])"
_WHOLE = re.compile(rf"{_ABSOLUTE}[^\n]*")
_INSIDE = re.compile(rf"(?<![\w.:/\\~-]){_ABSOLUTE}[^\s'\",;:()\[\]{{}}]+")


def shortened(provenance: Mapping[str, Any], *, keep: bool) -> tuple[Mapping[str, Any], list[str]]:
    """Return a provenance for other machines, and notes on what was shortened in it.

    Args:
        provenance: The provenance.
        keep: Whether to keep the paths.
    """
    found: dict[str, str] = {}
    short: Mapping[str, Any] = without_local_paths(provenance, found)
    if keep or not found:
        return provenance, []
    note = (
        f"{few(sorted(found), 3)} are paths of this machine, of which the archive there has the last part alone; say "
        f"{named('keep_paths', True)} to keep them"
    )
    return short, [note]


def without_local_paths(value: Any, found: dict[str, str]) -> Any:
    """Return a JSON value with absolute paths of this machine shortened to their last part.

    Args:
        value: The value; texts that are a path, and paths inside texts, such as a command, are shortened, and keys.
        found: Gets each path with what takes its place.
    """
    if isinstance(value, Mapping):
        return {without_local_paths(key, found): without_local_paths(each, found) for key, each in value.items()}
    if isinstance(value, list):
        return [without_local_paths(each, found) for each in value]
    if not isinstance(value, str):
        return value
    if _WHOLE.fullmatch(value) and " --" not in value:
        return _shortened(value, found)
    return _INSIDE.sub(lambda path: _shortened(path[0], found), value)


def _shortened(path: str, found: dict[str, str]) -> str:
    kind = PureWindowsPath if "\\" in path or re.match(r"[A-Za-z]:", path) else PurePosixPath
    name = kind(path).name or path
    if name != path:
        found[path] = name
    return name
