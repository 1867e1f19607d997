"""The text forms by which users select rows, and the tree that a condition becomes. Nothing in a text is executed.

A condition on rows, for ``where``:

    condition   := every ("or" every)*
    every       := one ("and" one)*
    one         := "not" one | "(" condition ")" | name | comparison ["?"]
    comparison  := name operator value | name ["not"] "in" "[" value, ... "]"
    operator    := == | != | < | <= | > | >=
    value       := a number, a text in quotes, true, false, null

A name that is not a plain word stands in backquotes. In backquotes, position, token and example are columns of the
dataset that have these names. `a == 1` is read as `a in [1]`, `a != 1` as `not a in [1]`, `a` alone as `a in [true]`. A
negative position counts from the end of its example, as in edits. A text that no example has in a column is an error,
unless "?" stands behind: `label == "rare"?`.

A list of numbers, for ``--examples``, ``--rows`` and ``--positions``: ``3,7,10-19``. A slice of positions, for edits:
``-3:``. A rule for positions, for the capture's ``--positions``: `residua.store.selection.positions`.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from residua.store.base.errors import AnalysisError, PlanError

Value: TypeAlias = int | float | str | bool | None

_LONGEST = 10_000
_DEEPEST = 50
_MAX_DIGITS = 20
_MAX_NUMBERS = 10_000_000
_RANGE = re.compile(r"\s*(-?\d{1,18})(?:-(-?\d{1,18}))?\s*", re.ASCII)
_TOKEN = re.compile(
    r"""\s*(?:(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)
    |(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    |(?P<operator>[=!<>]=|[<>])
    |(?P<mark>[()\[\],?])
    |(?P<name>[^\W\d]\w*|`[^`]+`))""",
    re.VERBOSE,
)
_CONSTANTS: dict[str, Value] = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_WORDS = {"and", "or", "not", "in"}


class Comparison(NamedTuple):
    """A name against values: with the operator ``in`` any number of them, with ``<``, ``<=``, ``>``, ``>=`` one.

    The name is one of the numbers of a row (`residua.store.selection.evaluate.ROW_NAMES`), else a column of the
    example table, as it is in any case with `is_column`. Values of the wrong kind are refused, and unless `may_miss`
    texts that no example has. An array of values is ascending.
    """

    name: str
    operator: str
    values: "Sequence[Value] | npt.NDArray[np.int64]"
    is_column: bool = False
    may_miss: bool = False


class ColumnIn(NamedTuple):
    """A column of the dataset has one of the values, as Python compares; a value of another kind equals nothing."""

    name: str
    values: tuple[Value, ...]


class At(NamedTuple):
    """Token positions of an example; negative ones count from its end."""

    positions: "tuple[int, ...] | slice"


class Not(NamedTuple):
    """True where the condition is false."""

    condition: "Condition"


class Every(NamedTuple):
    """True where all conditions are."""

    conditions: "tuple[Condition, ...]"


class Some(NamedTuple):
    """True where one of the conditions is."""

    conditions: "tuple[Condition, ...]"


Condition: TypeAlias = "Comparison | ColumnIn | At | Not | Every | Some"


def may_miss(condition: Condition) -> Condition:
    """Return a condition whose texts need not be those of any example."""
    match condition:
        case Not(one):
            return Not(may_miss(one))
        case Every(conditions):
            return Every(tuple(map(may_miss, conditions)))
        case Some(conditions):
            return Some(tuple(map(may_miss, conditions)))
        case Comparison():
            return condition._replace(may_miss=True)
    return condition


def parse_condition(text: str) -> Condition:
    """Return the condition that `text` states, by the grammar above.

    Raises:
        AnalysisError: It is not a condition; the message says where.
    """
    if len(text) > _LONGEST:
        raise AnalysisError(f"the filter has {len(text):,} characters: shorten it to {_LONGEST:,}")
    return _Parser(text).parse()


class _Token(NamedTuple):
    kind: str
    text: str


_END = _Token("end", "its end")


def _tokens(text: str) -> Iterator[_Token]:
    at, text = 0, text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            raise AnalysisError(
                f"the filter {text!r} cannot be read from {text[at:].strip()[:20]!r} on: "
                'write for example position > 0 and label == "code"'
            )
        at, kind, word = match.end(), match.lastgroup, match[match.lastgroup]
        if word in _WORDS | _CONSTANTS.keys():
            kind = "word" if word in _WORDS else "constant"
        yield _Token(kind, word)
    yield _END


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = list(_tokens(text))
        self._at = 0
        self._depth = 0

    def parse(self) -> Condition:
        condition = self._condition()
        if self._next != _END:
            self._fail("and, or, or the end")
        return condition

    def _condition(self) -> Condition:
        conditions = [self._every()]
        while self._took("or"):
            conditions.append(self._every())
        return Some(tuple(conditions)) if len(conditions) > 1 else conditions[0]

    def _every(self) -> Condition:
        conditions = [self._one()]
        while self._took("and"):
            conditions.append(self._one())
        return Every(tuple(conditions)) if len(conditions) > 1 else conditions[0]

    def _one(self) -> Condition:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise AnalysisError(f"the filter {self._text[:60]!r}... is nested more than {_DEEPEST} deep: simplify it")
        if self._took("not"):
            one: Condition = Not(self._one())
        elif self._took("("):
            one = self._condition()
            self._need(")")
        else:
            one = self._comparison()
            one = may_miss(one) if self._took("?") else one
        self._depth -= 1
        return one

    def _comparison(self) -> Condition:
        name = self._take("name", "the name of a column")
        compare = partial(Comparison, name.strip("`"), is_column=name.startswith("`"))
        if self._took("not"):
            self._need("in")
            return Not(compare("in", self._values()))
        if self._took("in"):
            return compare("in", self._values())
        if self._next.kind not in ("operator", "number", "text", "constant", "name"):
            return compare("in", (True,))
        operator = self._take("operator", "==, !=, <, <=, >, >= or in")
        if operator in ("==", "!="):
            equal = compare("in", (self._value(),))
            return equal if operator == "==" else Not(equal)
        if self._next.kind == "constant":
            self._fail("a number or a text")
        return compare(operator, (self._value(),))

    def _values(self) -> tuple[Value, ...]:
        closing = "]" if self._took("[") else ")"
        if closing == ")":
            self._need("(")
        values = [self._value()]
        while self._took(","):
            values.append(self._value())
        self._need(closing)
        return tuple(values)

    def _value(self) -> Value:
        kind, text = self._next
        if kind not in _READ:
            self._fail("a number, a text in quotes, true, false or null")
        self._at += 1
        return _READ[kind](text)

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _took(self, text: str) -> bool:
        found = self._next in (_Token("word", text), _Token("mark", text))
        self._at += found
        return found

    def _need(self, text: str) -> None:
        if not self._took(text):
            self._fail(text)

    def _take(self, kind: str, expected: str) -> str:
        if self._next.kind != kind:
            self._fail(expected)
        self._at += 1
        return self._tokens[self._at - 1].text

    def _fail(self, expected: str) -> NoReturn:
        raise AnalysisError(f"the filter {self._text!r} has {self._next.text} where {expected} was expected")


def _read_number(text: str) -> Value:
    if not text.lstrip("-").isdigit():
        return float(text)
    number = int(text) if len(text) <= _MAX_DIGITS else 2**63
    if not -(2**63) <= number < 2**63:
        raise AnalysisError(f"a filter has the number {text[:40]}: whole numbers have at most 64 bits; use 1e30")
    return number


def _unquote(text: str) -> Value:
    return re.sub(r"\\(.)", r"\1", text[1:-1])


_READ: dict[str, Callable[[str], Value]] = {
    "number": _read_number,
    "text": _unquote,
    "constant": lambda text: _CONSTANTS[text],
}


def is_number_or_range(text: str) -> bool:
    """Return whether `text` is one entry of a list of numbers: ``7`` or ``10-19``."""
    return _RANGE.fullmatch(text) is not None


def parse_numbers(text: str, flag: str, *, signed: bool = False) -> list[int]:
    """Return the numbers of a list such as ``3,7,10-19``, in its order.

    Args:
        text: The list.
        flag: Name of the option, for messages.
        signed: Whether numbers may be negative, as positions that count from the end are: ``-1``, ``-5--1``.

    Raises:
        PlanError: The text is no such list.
    """
    found: list[int] = []
    for word in text.split(","):
        entry = _RANGE.fullmatch(word)
        if entry is None or (not signed and "-" in (entry[1][0], (entry[2] or "0")[0])):
            raise PlanError(f"{flag} {text[:60]!r}: give numbers and ranges such as 3,7,10-19{' or -1' * signed}")
        first = int(entry[1])
        last = first if entry[2] is None else int(entry[2])
        if last < first:
            raise PlanError(f"{flag} {word[:60]!r}: a range goes up, but {last} is less than {first}")
        if last - first >= _MAX_NUMBERS:
            raise PlanError(f"{flag} {word[:60]!r} has over {_MAX_NUMBERS:,} numbers: give a shorter range")
        found += range(first, last + 1)
    return found


def format_numbers(numbers: npt.NDArray[np.int64]) -> str:
    """Return ascending numbers as a list with ranges: ``3,7,10-19``."""
    starts = np.flatnonzero(np.diff(numbers, prepend=-2) > 1)
    firsts, lasts = numbers[starts], numbers[[*(starts[1:] - 1), -1]] if len(numbers) else numbers
    pairs = zip(firsts.tolist(), lasts.tolist(), strict=True)
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in pairs)


def parse_slice(text: str, name: str) -> slice:
    """Return the slice of positions that ``-3:`` or ``5:10`` states.

    Args:
        text: The slice.
        name: Name of the field, for messages.

    Raises:
        PlanError: The text is no slice.
    """
    try:
        start, stop = (int(bound) if bound.strip() else None for bound in text.split(":"))
    except ValueError as error:
        raise PlanError(f"{name} {text[:60]!r} is not a slice such as '-3:' or '5:10'") from error
    return slice(start, stop)


def format_slice(positions: slice) -> str:
    """Return a slice as `parse_slice` reads it."""
    return ":".join("" if bound is None else str(bound) for bound in (positions.start, positions.stop))
