"""Capture, store, analyse and replay the activations of transformer models.

The names below are the public ones; each is loaded when it is first used, so that `import residua` costs nothing
and opening an archive needs neither torch nor transformers.
"""

import warnings
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from residua import analysis
    from residua.analysis.attention.headvis import heads
    from residua.analysis.attention.induction import induction_scores
    from residua.analysis.lens.lens import TunedLens
    from residua.analysis.page.page import page
    from residua.analysis.probes.probe import probe
    from residua.analysis.stats.difference import direction
    from residua.analysis.stats.stats import stats
    from residua.analysis.stats.top import top
    from residua.capture.layout.parameters import full_parameter
    from residua.capture.recording.recorder import Recorder
    from residua.capture.sites.names_to_modules import model_sites
    from residua.capture.taps.tap import TapGroup, tap
    from residua.pipelines.capture.capture import capture_dataset
    from residua.pipelines.capture.reproduce import reproduce
    from residua.pipelines.circuits.patch import attribute, patch
    from residua.pipelines.copies.concat import concat
    from residua.pipelines.copies.export import export
    from residua.pipelines.copies.extract import extract
    from residua.pipelines.replay.fidelity import fidelity
    from residua.pipelines.replay.replay import replay_dataset
    from residua.pipelines.runs.replay import replay
    from residua.pipelines.runs.run import run
    from residua.pipelines.setup.capture_settings import CaptureSettings
    from residua.store.base.errors import ResiduaError
    from residua.store.edits.overlay import overlay
    from residua.store.read.archive import Archive
    from residua.store.read.stacks import open_archive as open  # noqa: A004  # read as residua.open(path)
    from residua.store.sealing.seal import pack
    from residua.store.sharing.copy import copy
    from residua.store.sharing.pull import pull
    from residua.store.sharing.push import push
    from residua.store.verification.verify import verify

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
    "concat",
    "copy",
    "direction",
    "export",
    "extract",
    "fidelity",
    "full_parameter",
    "heads",
    "induction_scores",
    "model_sites",
    "open",
    "overlay",
    "pack",
    "page",
    "patch",
    "probe",
    "pull",
    "push",
    "replay",
    "replay_dataset",
    "reproduce",
    "run",
    "stats",
    "tap",
    "top",
    "verify",
]

_HOMES = {
    "Archive": "store.read.archive:Archive",
    "CaptureSettings": "pipelines.setup.capture_settings:CaptureSettings",
    "Recorder": "capture.recording.recorder:Recorder",
    "ResiduaError": "store.base.errors:ResiduaError",
    "TapGroup": "capture.taps.tap:TapGroup",
    "TunedLens": "analysis.lens.lens:TunedLens",
    "analysis": "analysis",
    "attribute": "pipelines.circuits.patch:attribute",
    "capture_dataset": "pipelines.capture.capture:capture_dataset",
    "concat": "pipelines.copies.concat:concat",
    "copy": "store.sharing.copy:copy",
    "direction": "analysis.stats.difference:direction",
    "export": "pipelines.copies.export:export",
    "extract": "pipelines.copies.extract:extract",
    "fidelity": "pipelines.replay.fidelity:fidelity",
    "full_parameter": "capture.layout.parameters:full_parameter",
    "heads": "analysis.attention.headvis:heads",
    "induction_scores": "analysis.attention.induction:induction_scores",
    "model_sites": "capture.sites.names_to_modules:model_sites",
    "open": "store.read.stacks:open_archive",
    "overlay": "store.edits.overlay:overlay",
    "pack": "store.sealing.seal:pack",
    "page": "analysis.page.page:page",
    "patch": "pipelines.circuits.patch:patch",
    "probe": "analysis.probes.probe:probe",
    "pull": "store.sharing.pull:pull",
    "push": "store.sharing.push:push",
    "replay": "pipelines.runs.replay:replay",
    "replay_dataset": "pipelines.replay.replay:replay_dataset",
    "reproduce": "pipelines.capture.reproduce:reproduce",
    "run": "pipelines.runs.run:run",
    "stats": "analysis.stats.stats:stats",
    "tap": "capture.taps.tap:tap",
    "top": "analysis.stats.top:top",
    "verify": "store.verification.verify:verify",
}
_RENAMED = {"whole_parameter": "full_parameter"}
"""Former public names; each works for one version more and warns."""


def __getattr__(name: str) -> Any:
    """Load a public name from its home."""
    if name in _RENAMED:
        new = _RENAMED[name]
        warnings.warn(
            f"residua.{name} is now residua.{new}: the old name will be removed", DeprecationWarning, stacklevel=2
        )
        name = new
    if name not in _HOMES:
        raise AttributeError(f"module 'residua' has no attribute {name!r}; it has {', '.join(__all__)}")
    from residua.store.base.extras import load

    return load(_HOMES[name], f"residua.{name}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
