"""Three ways to ask a place for something, each of which may be refused."""

from collections.abc import Callable
from typing import Any

import residua
from residua.store.storage.objects import ObjectFolder

WAYS: dict[str, Callable[[str, Any], object]] = {
    "open": lambda address, options: residua.open(address, storage_options=options),
    "list": lambda address, options: list(ObjectFolder(address, options).list()),
    "write": lambda address, options: ObjectFolder(address, options).create("x", b"1"),
}
