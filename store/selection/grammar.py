"""The grammar of conditions on rows, and its parser: text in, a tree out, nothing executed.

    condition   := every ("or" every)*
    every       := one ("and" one)*
    one         := "not" one | "(" condition ")" | name operator value | name ["not"] "in" "[" value, ... "]"
    operator    := == | != | < | <= | > | >=
    value       := a number, a text in quotes, true, false, null

A name that is not a plain word stands in backquotes. `a == 1` is read as `a in [1]`, `a != 1` as `not a in [1]`.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn, TypeAlias

from residua.store.base.errors import AnalysisError

Value: TypeAlias = int | float | str | bool | None

_LONGEST = 10_000
_DEEPEST = 50
_MOST_DIGITS = 20
_TOKEN = re.compile(
    r"""\s*(?:(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)
    |(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    |(?P<operator>[=!<>]=|[<>])
    |(?P<mark>[()\[\],])
    |(?P<name>[^\W\d]\w*|`[^`]+`))""",
    re.VERBOSE,
)
_CONSTANTS: dict[str, Value] = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_WORDS = {"and", "or", "not", "in"}


class Comparison(NamedTuple):
    """A column against values: with the operator ``in`` any number of them, with ``<``, ``<=``, ``>``, ``>=`` one."""

    name: str
    operator: str
    values: tuple[Value, ...]


class Not(NamedTuple):
    """True where the part is false."""

    part: "Condition"


class Every(NamedTuple):
    """True where all parts are."""

    parts: tuple["Condition", ...]


class Some(NamedTuple):
    """True where a part is."""

    parts: tuple["Condition", ...]


Condition: TypeAlias = "Comparison | Not | Every | Some"


def parse(text: str) -> Condition:
    """Return the condition that `text` spells, by the grammar in the module's head.

    Raises:
        AnalysisError: It is not a condition; the message says where.
    """
    if len(text) > _LONGEST:
        raise AnalysisError(f"a filter of {len(text):,} characters was given: at most {_LONGEST:,} are read")
    return _Parser(text).whole()


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

    def whole(self) -> Condition:
        condition = self._condition()
        if self._next != _END:
            self._fail("and, or, or the end")
        return condition

    def _condition(self) -> Condition:
        parts = [self._every()]
        while self._took("or"):
            parts.append(self._every())
        return Some(tuple(parts)) if len(parts) > 1 else parts[0]

    def _every(self) -> Condition:
        parts = [self._one()]
        while self._took("and"):
            parts.append(self._one())
        return Every(tuple(parts)) if len(parts) > 1 else parts[0]

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
        self._depth -= 1
        return one

    def _comparison(self) -> Condition:
        name = self._take("name", "the name of a column").strip("`")
        if self._took("not"):
            self._need("in")
            return Not(Comparison(name, "in", self._values()))
        if self._took("in"):
            return Comparison(name, "in", self._values())
        operator = self._take("operator", "==, !=, <, <=, >, >= or in")
        if operator in ("==", "!="):
            equal = Comparison(name, "in", (self._value(),))
            return equal if operator == "==" else Not(equal)
        if self._next.kind == "constant":
            self._fail("a number or a text")
        return Comparison(name, operator, (self._value(),))

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


def _number(text: str) -> Value:
    if not text.lstrip("-").isdigit():
        return float(text)
    number = int(text) if len(text) <= _MOST_DIGITS else 2**63
    if not -(2**63) <= number < 2**63:
        raise AnalysisError(f"a filter has the number {text[:40]}: whole numbers have at most 64 bits, write 1e30 say")
    return number


def _unquoted(text: str) -> Value:
    return re.sub(r"\\(.)", r"\1", text[1:-1])


_READ: dict[str, Callable[[str], Value]] = {
    "number": _number,
    "text": _unquoted,
    "constant": lambda text: _CONSTANTS[text],
}
