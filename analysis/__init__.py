"""Offline analysis of archives, without the model: probes, lenses, attention heads, statistics, batches for training.

Public names are loaded when they are first used. Uses `store` only.
"""

from typing import TYPE_CHECKING, Any

from residua.store.base.extras import load

if TYPE_CHECKING:
    from residua.analysis.attention.head_detector import head_detector
    from residua.analysis.loader.dictionary_learning import for_train_sae
    from residua.analysis.loader.loader import Loader
    from residua.analysis.loader.openmoss import for_openmoss
    from residua.analysis.loader.paired import PairedRows
    from residua.analysis.loader.sae_lens import for_multi_sae_lens, for_sae_lens
    from residua.analysis.loader.saev import for_saev
    from residua.analysis.probes.linear_probe import LinearProbe, LogisticProbe, RidgeProbe
    from residua.analysis.rows.dask_array import array
    from residua.analysis.rows.tables import record_batches, table
    from residua.analysis.support.cluster import connect

__all__ = [
    "LinearProbe",
    "Loader",
    "LogisticProbe",
    "PairedRows",
    "RidgeProbe",
    "array",
    "connect",
    "for_multi_sae_lens",
    "for_openmoss",
    "for_sae_lens",
    "for_saev",
    "for_train_sae",
    "head_detector",
    "record_batches",
    "table",
]

_HOMES = {
    "LinearProbe": "analysis.probes.linear_probe",
    "Loader": "analysis.loader.loader",
    "LogisticProbe": "analysis.probes.linear_probe",
    "PairedRows": "analysis.loader.paired",
    "RidgeProbe": "analysis.probes.linear_probe",
    "array": "analysis.rows.dask_array",
    "connect": "analysis.support.cluster",
    "for_multi_sae_lens": "analysis.loader.sae_lens",
    "for_openmoss": "analysis.loader.openmoss",
    "for_sae_lens": "analysis.loader.sae_lens",
    "for_saev": "analysis.loader.saev",
    "for_train_sae": "analysis.loader.dictionary_learning",
    "head_detector": "analysis.attention.head_detector",
    "record_batches": "analysis.rows.tables",
    "table": "analysis.rows.tables",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'residua.analysis' has no attribute {name!r}; it has {', '.join(__all__)}")
    return load(f"{_HOMES[name]}:{name}", f"residua.analysis.{name}")


def __dir__() -> list[str]:
    return sorted(__all__)
