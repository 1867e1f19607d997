"""Reads whole files of an archive that nobody vouches for: regular files inside it, no larger than they may be.

A pipe is not waited for, a link does not lead out, and a file of a terabyte of nothing takes no memory.
"""

import math
import os
from pathlib import Path

import yaml

from residua.store.base.errors import DamagedArchiveError, UnsafeArchiveError

_MAX_EXACT_INTEGER = 2**53


def check_inside(root: Path, path: Path) -> None:
    """Raise UnsafeArchiveError if a link on the way to `path` leads out of the archive `root`."""
    real, real_root = os.path.realpath(path), os.path.realpath(root)
    if not Path(real).is_relative_to(real_root):
        raise UnsafeArchiveError(
            f"{path} is a link that leads out of the archive, to {real}: if you trust whoever made it, copy the "
            "archive with links followed (cp -rL), and open the copy"
        )


def check_file(root: Path, path: Path, most_bytes: int) -> None:
    """Look at a file of the archive `root` before anything is read of it.

    Args:
        root: Folder of the archive.
        path: The file.
        most_bytes: How large such a file can be.

    Raises:
        DamagedArchiveError: The file is missing, or is no regular file.
        UnsafeArchiveError: It lies outside the archive, or is larger.
    """
    check_inside(root, path)
    if not path.exists():
        raise DamagedArchiveError(f"{path} is missing: restore it from a copy")
    if not path.is_file():
        raise DamagedArchiveError(f"{path} cannot be read, since it is not a file: restore it from a copy")
    size = path.stat().st_size
    if size > most_bytes:
        raise UnsafeArchiveError(
            f"{path} has {size:,} bytes, and no such file of ours is over {most_bytes >> 20:,} MiB: copy the archive "
            "again from where it came from"
        )


def read_file(root: Path, path: Path, most_bytes: int) -> bytes:
    """Return the bytes of a file of the archive `root`; raises as `check_file`, and if it cannot be read."""
    check_file(root, path, most_bytes)
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamagedArchiveError(f"{path} cannot be read ({error.strerror}): restore it from a copy") from error


def is_finite(value: object) -> bool:
    """Say whether `value` is a number that a float can hold; bools and integers of 2**53 and more are not."""
    if not isinstance(value, float | int) or isinstance(value, bool):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < _MAX_EXACT_INTEGER


# What PyYAML raises for scalars that do not fit their tag ("!!int ''", "2001-99-99"), besides its own errors.
_ERRORS = (yaml.YAMLError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError)


class _TreeLoader(yaml.SafeLoader):
    """YAML without references."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("references such as *name are not allowed here")
        return super().compose_node(parent, index)


def parse_yaml(text: str) -> object:
    """Return the plain value that a YAML or JSON text spells.

    Raises:
        ValueError: It is neither, or refers to its own parts.

    Example:
        >>> parse_yaml("a: [1, 2]")
        {'a': [1, 2]}
    """
    try:
        value: object = yaml.load(text, _TreeLoader)  # noqa: S506  # a SafeLoader that takes less
    except _ERRORS as error:
        raise ValueError(str(error)) from error
    return value
