"""Reads values that Python callers, YAML or JSON give for a named field: whole numbers, lists of them, texts.

Numbers and lists may come from numpy, torch or pandas. Everything else is a PlanError that names the field and shows
what was found.
"""

import sys
from typing import Any

from residua.store.base.errors import PlanError

MAX_LIST = 1_000_000
_LARGEST = 2**48
_MAX_TEXT = 4096


def plain(value: Any) -> Any:
    """Return Python numbers and lists in place of what numpy, torch or pandas hold them in."""
    return value.tolist() if hasattr(value, "tolist") else value


def finite_number(name: str, value: object) -> float:
    """Return a finite number."""
    largest = sys.float_info.max
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -largest <= value <= largest:
        raise PlanError(f"{name} is a finite number, found {str(value)[:60]!r}")
    return float(value)


def whole_number(name: str, value: object, *, least: int = 0) -> int:
    """Return a whole number from `least` on."""
    value = plain(value)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < _LARGEST:
        kind = f"a whole number from {least} on" if least == 0 else "a whole number"
        raise PlanError(f"{name} is {kind}, found {str(value)[:60]!r}")
    return value


def whole_numbers(name: str, value: Any, *, least: int = 0) -> tuple[int, ...]:
    """Return a list of whole numbers from `least` on; a single number is a list of one."""
    found = plain(value)
    if isinstance(found, int):
        found = [found]
    if not is_list(found, list | tuple | range):
        raise PlanError(f"{name} is a list of whole numbers, found {str(value)[:60]!r}")
    return tuple(whole_number(name, item, least=least) for item in found)


def signed_numbers(name: str, value: Any) -> tuple[int, ...]:
    """Return a list of whole numbers, negative ones too."""
    return whole_numbers(name, value, least=-_LARGEST)


def is_list(value: Any, kinds: Any = list | tuple) -> bool:
    """Return whether `value` is a list of a size that an edit may have."""
    return isinstance(value, kinds) and 0 < len(value) <= MAX_LIST


def text(name: str, value: object) -> str:
    """Return a text."""
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT:
        raise PlanError(f"{name} is a text, found {str(value)[:60]!r}")
    return value
