"""Canonical JSON: equal content has equal bytes, so that a digest names the content."""

import hashlib
import json
from collections.abc import Mapping
from typing import TypeAlias

from residua.store.base.errors import shortened

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
_MAX_LETTERS = 200  # of a value in a message


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

    Values are compared as canonical JSON: 1, 1.0 and true differ.

    Args:
        one: The first mapping.
        other: The second mapping.
        names: What has the one and the other value, for example ``("the archive", "this run")``.

    Example:
        >>> differences({"a": 1, "b": 2}, {"a": 1, "b": 3}, ("the archive", "this run"))
        ['b: the archive has 2, this run has 3']
    """
    texts = [{key: canonical_json(value).decode() for key, value in mapping.items()} for mapping in (one, other)]
    return [
        f"{key}: "
        + ", ".join(
            f"{name} has {shortened(text.get(key, 'nothing'), _MAX_LETTERS)}"
            for name, text in zip(names, texts, strict=True)
        )
        for key in sorted({*one, *other})
        if texts[0].get(key) != texts[1].get(key)
    ]
