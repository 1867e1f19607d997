"""Offline analysis of archives, without the model.

The public names are loaded when they are first used; each of the room's files says what it holds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from residua.analysis.detection import head_detector
    from residua.analysis.joins import record_batches, table
    from residua.analysis.linear_probe import LinearProbe, LogisticProbe, RidgeProbe
    from residua.analysis.loader import Loader
    from residua.analysis.views import array

__all__ = [
    "LinearProbe",
    "Loader",
    "LogisticProbe",
    "RidgeProbe",
    "array",
    "head_detector",
    "record_batches",
    "table",
]

_HOMES = {
    "LinearProbe": "linear_probe",
    "Loader": "loader",
    "LogisticProbe": "linear_probe",
    "RidgeProbe": "linear_probe",
    "array": "views",
    "head_detector": "detection",
    "record_batches": "joins",
    "table": "joins",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'residua.analysis' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"residua.analysis.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
