"""Canonical JSON: equal content has equal bytes, so that a digest names the content."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from residua.store.base.errors import shortened

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
_MAX_LETTERS = 200  # of a value in a message
_LETTERS_BEFORE = 40  # the difference in a longer value


def as_json(values: Mapping[str, object]) -> dict[str, Json]:
    """Return values of any kind, by name, as JSON values: what is of no such kind becomes its text."""

    def plain(value: object) -> Json:
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        if isinstance(value, Mapping):
            return as_json(value)
        return value if isinstance(value, str | int | float | bool | None) else str(value)

    return {str(name): plain(value) for name, value in values.items()}


def canonical_json(value: object) -> bytes:
    """Return `value` as JSON with sorted keys, no white space, UTF-8, and no NaN (in the spirit of RFC 8785).

    Raises:
        ValueError: `value` holds NaN, an infinity, or half of a surrogate pair, which JSON in UTF-8 cannot express.
        TypeError: `value` holds something that is not JSON.
        RecursionError: `value` is nested too deeply.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: object) -> str:
    """Return the SHA-256 of the canonical JSON of `value`, in hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def with_digest(name: str, entry: Mapping[str, object]) -> dict[str, object]:
    """Return the content of a file that has `entry` by its name, and its digest."""
    return {name: dict(entry), "sha256": digest_of(entry)}


def digested(content: Any, name: str) -> Any:
    """Return the entry of such a content.

    Raises:
        ValueError: The entry is not the one that the digest is of.
        KeyError, TypeError: The content is of another kind.
    """
    entry = content[name]
    if content["sha256"] != digest_of(entry):
        raise ValueError("its SHA-256 does not match its content")
    return entry


def flatten(value: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested mappings as one level with dotted keys; lists and empty mappings stay as they are."""
    flat: dict[str, object] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat.update(flatten(item, f"{prefix}{key}."))
        else:
            flat[prefix + key] = item
    return flat


def differences(one: Mapping[str, object], other: Mapping[str, object], names: tuple[str, str]) -> list[str]:
    """Return one line, for a message, for each key in which two mappings of JSON values differ.

    Values are compared as canonical JSON: 1, 1.0 and true differ. Of long values the line has the place where they
    begin to differ.

    Args:
        one: The first mapping.
        other: The second mapping.
        names: What has the one and the other value, for example ``("the archive", "this run")``.

    Example:
        >>> differences({"a": 1, "b": 2}, {"a": 1, "b": 3}, ("the archive", "this run"))
        ['b: the archive has 2, this run has 3']
    """
    texts = [{key: canonical_json(value).decode() for key, value in mapping.items()} for mapping in (one, other)]
    lines = []
    for key in sorted({*one, *other}):
        found = [text.get(key, "nothing") for text in texts]
        if found[0] == found[1]:
            continue
        if max(map(len, found)) > _MAX_LETTERS:
            n_equal = next((i for i, (a, b) in enumerate(zip(*found, strict=False)) if a != b), min(map(len, found)))
            start = max(0, n_equal - _LETTERS_BEFORE)
            found = ["..." * bool(start) + text[start:] for text in found]
        named = (f"{name} has {shortened(text, _MAX_LETTERS)}" for name, text in zip(names, found, strict=True))
        lines.append(f"{key}: {', '.join(named)}")
    return lines
