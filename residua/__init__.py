"""Capture, store, analyse and replay the activations of transformer models.

The names below are the public ones; each is loaded when it is first used, so that `import residua` costs nothing
and opening an archive needs neither torch nor transformers.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from residua import analysis
    from residua.analysis.induction import induction_scores
    from residua.analysis.lens import TunedLens
    from residua.analysis.probe import probe
    from residua.analysis.stats import stats
    from residua.analysis.top import top
    from residua.capture.parameters import whole_parameter
    from residua.capture.recorder import Recorder
    from residua.capture.replay import replay
    from residua.capture.sites import model_sites
    from residua.capture.tap import tap
    from residua.capture.tapgroup import TapGroup
    from residua.pipelines.capture import capture_dataset
    from residua.pipelines.fidelity import fidelity
    from residua.pipelines.patch import attribute, patch
    from residua.pipelines.replay import replay_dataset
    from residua.pipelines.reproduce import reproduce
    from residua.pipelines.settings import CaptureSettings
    from residua.store.archive import Archive
    from residua.store.archive import Archive as open  # noqa: A004, N813  # read as residua.open(path)
    from residua.store.errors import ResiduaError
    from residua.store.overlay import overlay
    from residua.store.verify import verify

__version__ = version("residua")
__all__ = [
    "Archive",
    "CaptureSettings",
    "Recorder",
    "ResiduaError",
    "TapGroup",
    "TunedLens",
    "analysis",
    "attribute",
    "capture_dataset",
    "fidelity",
    "induction_scores",
    "model_sites",
    "open",
    "overlay",
    "patch",
    "probe",
    "replay",
    "replay_dataset",
    "reproduce",
    "stats",
    "tap",
    "top",
    "verify",
    "whole_parameter",
]

_HOMES = {
    "Archive": "store.archive:Archive",
    "CaptureSettings": "pipelines.settings:CaptureSettings",
    "Recorder": "capture.recorder:Recorder",
    "ResiduaError": "store.errors:ResiduaError",
    "TapGroup": "capture.tapgroup:TapGroup",
    "TunedLens": "analysis.lens:TunedLens",
    "analysis": "analysis",
    "attribute": "pipelines.patch:attribute",
    "capture_dataset": "pipelines.capture:capture_dataset",
    "fidelity": "pipelines.fidelity:fidelity",
    "induction_scores": "analysis.induction:induction_scores",
    "model_sites": "capture.sites:model_sites",
    "open": "store.archive:Archive",
    "overlay": "store.overlay:overlay",
    "patch": "pipelines.patch:patch",
    "probe": "analysis.probe:probe",
    "replay": "capture.replay:replay",
    "replay_dataset": "pipelines.replay:replay_dataset",
    "reproduce": "pipelines.reproduce:reproduce",
    "stats": "analysis.stats:stats",
    "tap": "capture.tap:tap",
    "top": "analysis.top:top",
    "verify": "store.verify:verify",
    "whole_parameter": "capture.parameters:whole_parameter",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'residua' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, _, attribute = _HOMES[name].partition(":")
    found = import_module(f"residua.{module}")
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
