"""Which extra of the distribution a job needs, and the error that names it.

`pip install residua` gives what reading and verifying an archive needs. Capturing and analysing need more packages,
which the extras `capture` and `analysis` of `pyproject.toml` list; `all` is both.
"""

import traceback
from importlib import import_module
from typing import Any

from residua.store.base.errors import MissingPackageError

PACKAGES = {
    "capture": ("PIL", "accelerate", "datasets", "fsspec", "huggingface_hub", "torch", "transformers"),
    "analysis": ("dask", "distributed", "matplotlib", "scipy", "sklearn", "threadpoolctl", "torch"),
}
"""The modules that each extra installs, by the extra's name, which is also a room's."""


def missing_package(error: ModuleNotFoundError, wanted: str) -> MissingPackageError | None:
    """Return the error that says which extra to install, or None if no extra has the module.

    Args:
        error: The import that failed. Its traceback says which room wanted the module.
        wanted: What the user asked for, for the message: ``residua.tap``, ``residua capture``.
    """
    module = (error.name or "").partition(".")[0]
    names = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    rooms = [name.split(".")[1] for name in names if name.startswith("residua.")]
    extras = [extra for extra in (*rooms[-1:], *PACKAGES) if module in PACKAGES.get(extra, ())]
    if not extras:
        return None
    return MissingPackageError(f"{wanted} needs {module}, which is not installed: pip install 'residua[{extras[0]}]'")


def load(home: str, wanted: str) -> Any:
    """Import what a public name stands for.

    Args:
        home: ``module:attribute`` below `residua`, or a module alone.
        wanted: The public name, for the message.

    Raises:
        MissingPackageError: It needs a package that an extra installs.
    """
    module, _, attribute = home.partition(":")
    try:
        found = import_module(f"residua.{module}")
    except ModuleNotFoundError as error:
        explained = missing_package(error, wanted)
        if explained is None:
            raise
        raise explained from error
    return getattr(found, attribute) if attribute else found
