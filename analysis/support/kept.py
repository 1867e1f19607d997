"""Values that a worker keeps from one pass over the data to the next, within a number of bytes.

What does not fit is made again in every pass, so whether a value is kept changes the time and nothing else. The values
of an analysis go when it ends, or when another one needs the room: a process that was interrupted leaves none behind
that would stay in the way.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

Value = TypeVar("Value")


class _Kept(NamedTuple):
    value: Any
    n_bytes: int


_lock = threading.Lock()
_kept: dict[tuple[str, object], _Kept] = {}  # by analysis and key


def kept(
    analysis: str, key: object, make: Callable[[], Value], n_bytes: Callable[[Value], int], *, most_bytes: int
) -> Value:
    """Return the value of `key`: the one that this process keeps, or else a new one, which is kept if it fits.

    Args:
        analysis: A text that no other analysis has.
        key: Names the value within its analysis.
        make: Makes the value.
        n_bytes: Returns the bytes that a value takes.
        most_bytes: Bytes that may be kept in this process, by all analyses together.
    """
    with _lock:
        found = _kept.get((analysis, key))
    if found is not None:
        value: Value = found.value
        return value
    value = make()
    size = n_bytes(value)
    with _lock:
        others = [name for name in _kept if name[0] != analysis]
        if sum(one.n_bytes for one in _kept.values()) + size > most_bytes:
            for name in others:
                del _kept[name]
        if sum(one.n_bytes for one in _kept.values()) + size <= most_bytes:
            _kept[analysis, key] = _Kept(value, size)
    return value


def let_go(analysis: str, keys: Iterable[object] | None = None) -> None:
    """Keep no value of `analysis` any longer in this process, or none of `keys`."""
    with _lock:
        found = [name for name in _kept if name[0] == analysis]
        for name in found if keys is None else {(analysis, key) for key in keys}.intersection(found):
            del _kept[name]


def kept_bytes() -> int:
    """Return the bytes that this process keeps."""
    with _lock:
        return sum(one.n_bytes for one in _kept.values())
