"""Lists on the command line: tokens as ids or as texts, and values that begin with a minus sign."""

import json
import re
from collections.abc import Sequence

from residua.store.base.errors import PlanError
from residua.store.selection.grammar import is_number_or_range, parse_numbers

_ITEM = re.compile(r'\s*("(?:[^"\\]|\\.)*")\s*,|([^,]*),')  # a JSON string, or whatever has no comma
_FLAG, _NEGATIVE = re.compile(r"--[^=]+"), re.compile(r"-\d")


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
        elif is_number_or_range(plain):
            found += parse_numbers(plain, flag)
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
