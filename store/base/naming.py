"""How a setting is declared, and how a message names it: as a flag on the command line, as an argument in Python.

A message calls `named` where it speaks of a setting. The command line says once that settings are flags there.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import field
from typing import Any

from residua.store.base.errors import shortened

_OTHER_FLAGS = {"captured_from": "--from", "n_batches": "--batches", "n_examples": "--examples"}
_PLAIN = re.compile(r"[\w.,:/*@+-]+")  # text that a shell takes as it is
_MOST = 200  # characters of a value: a path is shown whole
_NO_VALUE = object()
_as_flags: ContextVar[bool] = ContextVar("_as_flags", default=False)


def setting(default: Any, text: str) -> Any:
    """Return a dataclass field with `text` as its help on the command line, which adds a default other than None."""
    return field(default=default, metadata={"help": text})


def flag_of(name: str) -> str:
    """Return the flag of a setting: ``--max-length`` for ``max_length``."""
    return _OTHER_FLAGS.get(name) or "--" + name.replace("_", "-")


def named(name: str, value: object = _NO_VALUE) -> str:
    """Return a setting, or a setting with a value, as the caller writes it.

    Example:
        >>> named("max_length"), named("split", "test"), named("head", False)
        ('max_length=', "split='test'", 'head=False')
        >>> with naming_flags():
        ...     named("max_length"), named("split", "test"), named("head", False)
        ('--max-length', '--split test', '--no-head')
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not names_flags():
        return f"{name}=" + ("" if value is _NO_VALUE else shortened(repr(value), _MOST))
    if value is _NO_VALUE or value is True:
        return flag_of(name)
    if value is False:
        return "--no-" + flag_of(name).removeprefix("--")
    text = str(value)
    return f"{flag_of(name)} {shortened(text if _PLAIN.fullmatch(text) else repr(text), _MOST)}"


def names_flags() -> bool:
    """Say whether settings are named as flags."""
    return _as_flags.get()


@contextmanager
def naming_flags(on: bool = True) -> Iterator[None]:
    """Name settings as flags inside the ``with`` block, in this thread."""
    token = _as_flags.set(on)
    try:
        yield
    finally:
        _as_flags.reset(token)
