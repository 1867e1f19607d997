"""A trial of the place where results will be written, on small files, before anything runs."""

import os
import re
import secrets
from pathlib import Path

from residua.store.base.errors import PlanError
from residua.store.storage.files import make_folders, publish, sweep_next_to, write_file
from residua.store.storage.lock import naming_archive

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


def try_place(destination: Path, *, links: bool = False) -> None:
    """Write and rename a small file next to `destination`, durably, and link it if `links` are needed; then remove it.

    Args:
        destination: File or folder that will be written; its parent is made.
        links: Whether hard links are needed, as for the commit records of an archive.

    Raises:
        PlanError: `destination` is the address of a bucket or server, or a link that leads nowhere.
        OSError: The place cannot be written, is full, or has no links; the message says what to do.
    """
    if found := _ADDRESS.match(str(destination)):
        raise PlanError(
            f"{destination} is an address ({found[1]}), and results are written to folders only: write to a local "
            "folder, and copy it when it is finished"
        )
    if destination.is_symlink() and not destination.exists():
        raise PlanError(
            f"{destination} is a link to {destination.readlink()}, which does not exist: make that folder, or choose "
            "another place"
        )
    trial = destination.with_name(f".{destination.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with naming_archive(destination):
        make_folders(destination.parent)
        sweep_next_to(destination)
        trial.touch(exist_ok=False)
    try:
        write_file(trial, [b"a trial"])
        if links:
            trial.unlink(missing_ok=True)
            publish(trial, b"a trial")
    except OSError as error:
        raise OSError(error.errno, (error.strerror or str(error)).replace(str(trial), str(destination))) from error
    finally:
        trial.unlink(missing_ok=True)
