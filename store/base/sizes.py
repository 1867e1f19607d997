"""Sizes in bytes, written alike everywhere: a number of bytes, or a text such as ``2GB`` or ``4GiB``."""

import re
from typing import TypeAlias

from residua.store.base.errors import PlanError
from residua.store.base.naming import named

Size: TypeAlias = int | str

_UNITS = {"": 1, **{unit: 1000**i for i, unit in enumerate("kmgtp", 1)}}
_UNITS |= {f"{unit}i": 1024**i for i, unit in enumerate("kmgtp", 1)}
_TEXT = re.compile(r"(\d{1,20}(?:\.\d{1,10})?)\s*([kmgtp]?i?)b?", re.IGNORECASE | re.ASCII)


def n_bytes(size: Size, name: str) -> int:
    """Return a size in bytes; ``kB``, ``MB``, ``GB``, ``TB`` are powers of 1000, and ``KiB``, ``MiB``, ... of 1024.

    Args:
        size: A number of bytes, or a text with or without a unit.
        name: Name of the setting, for messages.

    Raises:
        PlanError: It is no size, or less than a byte.

    Example:
        >>> n_bytes("2GB", "host_memory"), n_bytes("1.5 GiB", "host_memory"), n_bytes(512, "host_memory")
        (2000000000, 1610612736, 512)
    """
    found: int | None = None
    if isinstance(size, str):
        match = _TEXT.fullmatch(size.strip())
        if match is not None and (unit := match[2].lower()) in _UNITS:
            found = int(float(match[1]) * _UNITS[unit]) if "." in match[1] else int(match[1]) * _UNITS[unit]
    elif isinstance(size, int) and not isinstance(size, bool):
        found = size
    if found is None or found < 1:
        raise PlanError(
            f"{named(name, size)} is no size: write a number of bytes of at least 1, or such as 512MB or 4GiB"
        )
    return found
