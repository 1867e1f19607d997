"""Datasets on the hub: whether the hub answers is found out in seconds, and one commit is read throughout."""

from collections.abc import Callable
from typing import Any

from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.store.base.errors import DatasetError

_TIMEOUT = 10.0  # seconds for the one request that finds out whether the hub answers


def open_hub(name: str, settings: DatasetSettings) -> Any:
    """Open the hub dataset `name` as a stream, or offline (HF_HUB_OFFLINE=1) what the cache has of it.

    Raises:
        DatasetError: There is no such dataset, or the hub does not answer.
    """
    import datasets
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        revision = _hub_revision(name, settings.revision)
    except OfflineModeIsEnabled:
        return _reading(name, lambda: datasets.load_dataset(name, settings.subset, revision=settings.revision))
    except Exception as error:
        # The boundary to the hub's client and its transport, whose errors have no common base.
        raise _not_found(name, error) from error
    return _reading(name, lambda: datasets.load_dataset(name, settings.subset, revision=revision, streaming=True))


def dataset_commit(name: str, settings: DatasetSettings) -> str | None:
    """Return the commit of the hub dataset `name`; None offline, where only a cache was read.

    Raises:
        DatasetError: There is no such dataset, or the hub does not answer.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        return _hub_revision(name, settings.revision)
    except OfflineModeIsEnabled:
        return None
    except Exception as error:
        # The boundary to the hub's client, as above.
        raise _not_found(name, error) from error


def _hub_revision(name: str, revision: str | None) -> str | None:
    """Ask for the commit that `revision` is, in one short request; raises whatever the client does."""
    from huggingface_hub import HfApi

    # load_dataset would retry for the better part of a minute where there is no network.
    return HfApi().dataset_info(name, revision=revision, timeout=_TIMEOUT).sha


def _reading(name: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:
        # The boundary to `datasets`, which passes on whatever its parsers and transports raise.
        raise _not_found(name, error) from error


def _not_found(name: str, error: Exception) -> DatasetError:
    return DatasetError(
        f"dataset {name!r}: there is no such file or folder here, and it could not be read from the hub "
        f"({type(error).__name__}: {error}); check the path, the id and the network"
    )
