"""Checks of untrusted input: archives, edits and lenses are read as if somebody had forged them.

Three kinds of checks live here, and every reader calls them:

* sizes: `size_problem` bounds a number, `check_file` and `read_file` bound a file, before memory is taken for either;
* names and paths: `name_problem` for a name that a file holds, `check_inside` for links that lead out of a folder;
* shapes: `shape_problem`.

Functions called `..._problem` return what is wrong, or an empty text; the caller raises the error that fits. The limits
of the format are the constants below. `parse_json` and `parse_yaml` read plain values and never execute anything.
"""

import json
import math
import os
import stat
from functools import lru_cache
from pathlib import Path, PurePosixPath

import yaml

from residua.store.base.errors import DamagedArchiveError, UnsafeArchiveError, shortened

MAX_RANK = 6
MAX_ROWS = 2**48
MAX_ROWS_PER_SHARD = 2**31
MAX_COLUMN_SHARDS = 2**12
MAX_ROW_BYTES = 2**31
MAX_CHUNK_BYTES = 2**30
MAX_SHARD_BYTES = 2**36
MAX_INDEX_BYTES = 2**46
_MAX_EXACT_INTEGER = 2**53
# PyYAML raises these for scalars that do not fit their tag ("!!int ''", "2001-99-99"), besides its own errors.
_YAML_ERRORS = (yaml.YAMLError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError)


def size_problem(what: str, value: object, most: int, least: int = 0) -> str:
    """Return what is wrong with `value`, which must be an integer from `least` to `most`; empty if it is one.

    Example:
        >>> size_problem("rows", -1, 10)
        'rows: -1 is not an integer from 0 to 10'
    """
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return ""
    return f"{what}: {shortened(repr(value))} is not an integer from {least:,} to {most:,}"


def shape_problem(what: str, value: object, *, max_rank: int, most: int, least: int = 0) -> str:
    """Return what is wrong with `value`, which must be a list or tuple of sizes; empty if it is one.

    Args:
        what: What has the shape, for the message.
        value: The shape.
        max_rank: Most sizes; there must be at least one.
        most: Largest size.
        least: Smallest size.
    """
    if not isinstance(value, list | tuple) or not 0 < len(value) <= max_rank:
        return f"{what}: {shortened(repr(value))} is not a shape of 1 to {max_rank} sizes"
    problems = (size_problem(f"{what} {shortened(repr(value))}", size, most, least) for size in value)
    return next(filter(None, problems), "")


def name_problem(name: str) -> str:
    """Return what is wrong with `name`, which must name a file or folder inside another; empty if it does."""
    parts = PurePosixPath(name).parts
    if parts and "/".join(parts) == name and not {"..", "/"} & set(parts) and name.isprintable():
        return ""
    return f"{shortened(repr(name))} is not a path inside the folder"


def is_finite(value: object) -> bool:
    """Say whether `value` is a number that a float can hold; bools and integers of 2**53 and more are not."""
    if not isinstance(value, float | int) or isinstance(value, bool):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < _MAX_EXACT_INTEGER


def is_inside(root: Path, path: Path) -> bool:
    """Say whether `path`, with links followed, is in the folder `root`; a name that no file can have is not.

    In a cache of the Hugging Face Hub, files are links to `blobs`, next to the folder of snapshots that `root` is in.
    These count as inside.
    """
    try:
        if _has_no_links(root, path):
            return True
        real, folder = Path(os.path.realpath(path)), Path(os.path.realpath(root))
        return real.is_relative_to(folder) or real.parent == _hub_blobs(folder)
    except (OSError, ValueError, RuntimeError):
        return False


def _has_no_links(root: Path, path: Path) -> bool:
    """Say whether `path` is below `root` by name and no part below is a link: far fewer calls than for a real path."""
    depth, at = len(root.parts), str(root)
    if path.parts[:depth] != root.parts or ".." in path.parts[depth:]:
        return False
    for name in path.parts[depth:]:
        at = f"{at}{os.sep}{name}"
        try:
            if stat.S_ISLNK(os.lstat(at).st_mode):
                return False
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False
    return True


@lru_cache(maxsize=64)
def _hub_blobs(folder: Path) -> Path | None:
    """Return the folder of files of the Hub's cache that `folder` is in: `REPOSITORY/snapshots/REVISION/...`."""
    for snapshot in (folder, *folder.parents):
        if snapshot.parent.name == "snapshots" and (blobs := snapshot.parent.parent / "blobs").is_dir():
            return Path(os.path.realpath(blobs))
    return None


def check_inside(root: Path, path: Path) -> None:
    """Raise UnsafeArchiveError if a link on the way to `path` leads out of the archive `root`."""
    if not is_inside(root, path):
        raise UnsafeArchiveError(
            f"{path} is a link that leads out of the archive, to {os.path.realpath(path)}: if you trust whoever made "
            "it, copy the archive with links followed (cp -rL), and open the copy"
        )


def require_there(root: Path) -> None:
    """Raise DamagedArchiveError if the archive `root`, which was there, is not there any more."""
    if not root.exists():
        raise DamagedArchiveError(
            f"{root} was moved, renamed or removed while it was open: open the archive again under its new path"
        )


def check_file(root: Path, path: Path, most_bytes: int) -> None:
    """Check a file of the archive `root` before any of it is read.

    A pipe is not waited for, and a sparse file of a terabyte takes no memory.

    Args:
        root: Folder of the archive.
        path: The file.
        most_bytes: Largest size of such a file.

    Raises:
        DamagedArchiveError: The file is missing, or is not a regular file.
        UnsafeArchiveError: It is outside the archive, or is larger.
    """
    check_inside(root, path)
    if not path.exists():
        require_there(root)
        raise DamagedArchiveError(f"{path} is missing: restore it from a copy")
    if not path.is_file():
        raise DamagedArchiveError(f"{path} cannot be read, since it is not a file: restore it from a copy")
    size = path.stat().st_size
    if size > most_bytes:
        raise UnsafeArchiveError(
            f"{path} has {size:,} bytes, but Residua writes at most {most_bytes >> 20:,} MiB there: copy the archive "
            "again from where it came from"
        )


def read_file(root: Path, path: Path, most_bytes: int) -> bytes:
    """Return the bytes of a file of the archive `root`; raises as `check_file`, and if it cannot be read."""
    check_file(root, path, most_bytes)
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamagedArchiveError(f"{path} cannot be read ({error.strerror}): restore it from a copy") from error


def parse_json(text: bytes | str) -> object:
    """Return the value of a JSON text.

    Raises:
        ValueError: It is not JSON, or is nested too deeply.
    """
    try:
        value: object = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"it is nested too deeply ({error})") from error
    return value


class _TreeLoader(yaml.SafeLoader):
    """YAML without references, which could make a small file a huge value."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("references such as *name are not allowed here")
        return super().compose_node(parent, index)


def parse_yaml(text: str) -> object:
    """Return the plain value of a YAML or JSON text; tags other than YAML's own are refused.

    Raises:
        ValueError: It is neither, or contains references.

    Example:
        >>> parse_yaml("a: [1, 2]")
        {'a': [1, 2]}
    """
    try:
        value: object = yaml.load(text, _TreeLoader)  # noqa: S506  # a SafeLoader that takes less
    except _YAML_ERRORS as error:
        raise ValueError(str(error)) from error
    return value
