"""One spelling of JSON, so that equal content has equal bytes and a digest means something."""

import hashlib
import json
from collections.abc import Mapping
from typing import TypeAlias

from residua.store.base.errors import shortened

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


def canonical_json(value: object) -> bytes:
    """Return `value` as JSON with sorted keys, no white space, UTF-8, and no NaN (RFC 8785's spirit).

    Raises:
        ValueError: `value` holds NaN, an infinity, or half of a surrogate pair, which JSON in UTF-8 cannot spell.
        TypeError: `value` holds something that is not JSON.
        RecursionError: `value` is nested too deeply.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: object) -> str:
    """Return the SHA-256 of the canonical JSON of `value`, in hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def flatten(value: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested mappings as one level with dotted keys; lists and empty mappings stay whole."""
    flat: dict[str, object] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat.update(flatten(item, f"{prefix}{key}."))
        else:
            flat[prefix + key] = item
    return flat


def differing(there: Mapping[str, object], here: Mapping[str, object], *, word: str) -> list[str]:
    """Return one line for each value in which two mappings of JSON values differ, for people.

    Args:
        there: The one.
        here: The other.
        word: Where the other is: ``now``, ``here``.
    """
    one, other = flatten(there), flatten(here)
    keys = [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]
    return [f"{key}: {_short(one.get(key))} there, {_short(other.get(key))} {word}" for key in keys]


def _short(value: object) -> str:
    return shortened(json.dumps(value))
