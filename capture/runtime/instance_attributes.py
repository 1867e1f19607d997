"""Attributes of one object that hide those of its class for a while, such as a block's ``forward``."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def instance_attribute(owner: object, name: str, value: Any) -> Iterator[None]:
    """Give an object an attribute of its own inside; afterwards it has the one that it had, or that of its class.

    The attribute goes past ``__setattr__``, which torch modules have for parameters and submodules.

    Args:
        owner: The object.
        name: Name of the attribute.
        value: What it is inside.
    """
    attributes = vars(owner)
    had_own, before = name in attributes, attributes.get(name)
    attributes[name] = value
    try:
        yield
    finally:
        if had_own:
            attributes[name] = before
        else:
            del attributes[name]
