"""Lists as the command line spells them: numbers and ranges, and tokens as ids or as texts."""

import json
import re
from collections.abc import Sequence

from residua.store.base.errors import PlanError

_MOST = 10_000_000
_RANGE = re.compile(r"\s*(-?\d{1,18})(?:-(-?\d{1,18}))?\s*", re.ASCII)
_ITEM = re.compile(r'\s*("(?:[^"\\]|\\.)*")\s*,|([^,]*),')  # a JSON string, or whatever has no comma
_FLAG, _NEGATIVE = re.compile(r"--[^=]+"), re.compile(r"-\d")


def numbers(text: str, flag: str, *, signed: bool = False) -> list[int]:
    """Return the numbers that ``3,7,10-19`` spells.

    Args:
        text: What was given.
        flag: For messages.
        signed: Whether numbers may be negative, as positions that count from the end are: ``-1``, ``-5--1``.

    Raises:
        PlanError: It is no such list.
    """
    found: list[int] = []
    for word in text.split(","):
        spelt = _RANGE.fullmatch(word)
        if spelt is None or (not signed and "-" in (spelt[1][0], (spelt[2] or "0")[0])):
            raise PlanError(f"{flag} {text[:60]!r}: give numbers and ranges such as 3,7,10-19{' or -1' * signed}")
        first = int(spelt[1])
        last = first if spelt[2] is None else int(spelt[2])
        if last < first:
            raise PlanError(f"{flag} {word[:60]!r}: a range goes up, and {last} is less than {first}")
        if last - first >= _MOST:
            raise PlanError(f"{flag} {word[:60]!r} has over {_MOST:,} numbers")
        found += range(first, last + 1)
    return found


def tokens(text: str, flag: str) -> list[int | str]:
    """Return the tokens that ``17,40-44, the,"7"`` spells: numbers are ids, anything else is a text.

    A text that has commas or is a number stands in double quotes, as in JSON.

    Raises:
        PlanError: A text is empty, or its quotes are not those of JSON.
    """
    found: list[int | str] = []
    for item in _ITEM.finditer(text + ","):
        quoted, plain = item.groups()
        if quoted is not None:
            found.append(_from_json(quoted, flag))
        elif _RANGE.fullmatch(plain):
            found += numbers(plain, flag)
        elif not plain:
            raise PlanError(f"{flag} {text[:60]!r}: a token between commas is empty; give ids, or texts")
        else:
            found.append(plain)
    return found


def _from_json(quoted: str, flag: str) -> str:
    try:
        return str(json.loads(quoted))
    except ValueError as error:
        raise PlanError(f"{flag} {quoted[:60]}: this is no text in double quotes ({error})") from error


def with_negative_values(words: Sequence[str]) -> list[str]:
    """Bind each value such as ``-3,-1`` to the flag before it; argparse would take it for a flag itself."""
    bound: list[str] = []
    for word in words:
        if _NEGATIVE.match(word) and bound and _FLAG.fullmatch(bound[-1]):
            bound[-1] += f"={word}"
        else:
            bound.append(word)
    return bound
