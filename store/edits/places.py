"""Where an edit takes values from: files and folders of this machine, and archives, lenses and files at addresses.

Text that names a file or folder of this machine stays inside the folder of the edits. An address names none, so it may
be any; what is not an address stays, for edits at an address, in the folder there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from residua.store.base.errors import PlanError, StorageError
from residua.store.base.untrusted import is_inside, name_problem
from residua.store.storage.address import check_address, is_remote, shown


@dataclass(frozen=True)
class Address:
    """An address that an edit names.

    Attributes:
        address: The address.
        options: As for `residua.open`; shown and kept nowhere.
    """

    address: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        return shown(self.address)


Place: TypeAlias = Path | Address


def place_of(name: str, folder: Place) -> Place:
    """Return the place that a text names.

    Args:
        name: An address, or a path in the folder of the edits or below.
        folder: The folder of the edits.

    Raises:
        PlanError: The name leads out of the folder, no file can have it, or the address is not understood.
    """
    if not is_remote(name):
        return inside(name, folder) if isinstance(folder, Path) else _below(name, folder)
    try:
        check_address(name)
    except StorageError as error:
        raise PlanError(str(error)) from error
    return Address(name.rstrip("/"))


def _below(name: str, folder: Address) -> Address:
    if name_problem(name):
        raise PlanError(
            f"{name!r} leads out of {folder}: copy what an edit names to the folder of the edits, or give its address"
        )
    return Address(f"{folder.address}/{name}", folder.options)


def inside(name: str, folder: Path) -> Path:
    """Return the path of `name` in `folder` or below.

    Raises:
        PlanError: The name leads out of the folder, or no file can have it.
    """
    try:
        path = (folder / name).resolve()
        _ = path.exists()  # there are names that no file can have
    except (OSError, ValueError, RuntimeError) as error:
        raise PlanError(f"{name!r} is not the name of a file: {error}") from error
    if not is_inside(folder, path):
        raise PlanError(
            f"{name!r} leads out of {folder}: copy what an edit names to the folder of the edits, or, in Python, give "
            "it as a pathlib.Path"
        )
    return path
