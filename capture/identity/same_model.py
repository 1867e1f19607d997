"""Whether a model is the one that an archive was captured from, and what is another now than it was then."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from residua.capture.identity.provenance import changed_conditions, config_differences, identify_model, layout
from residua.capture.runtime.pipeline_schedule import runnable
from residua.capture.runtime.sharded import plain_class
from residua.capture.runtime.wrappers import core_of, running_uncompiled
from residua.capture.sites.attention import eager_attention
from residua.capture.sites.shape_probe import evaluating
from residua.store.base.errors import CaptureError, PlanError
from residua.store.read.archive import Archive

_IDENTITY = ("class", "weights", "config")  # the other entries are conditions under which the same model runs


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What comparing a model with an archive found.

    Attributes:
        identity: What is known of the model here, as in the plan's `model` entry.
        notes: One sentence for each thing that differs.
    """

    identity: Mapping[str, object]
    notes: tuple[str, ...]


def check_model(archive: Archive, model: nn.Module, *, force: bool = False) -> Checked:
    """Compare a model and the conditions here with those of the capture.

    Args:
        archive: The archive.
        model: The model, on its device.
        force: Take another model too, and say so.

    Raises:
        PlanError: It is another model.
    """
    expected = archive.plan.model
    found, notes = _identity_here(model)
    wrong = [key for key in _IDENTITY if key in expected and key in found and found[key] != expected[key]]
    lines = [f"{key}: {_short(expected[key])} in the archive, {_short(found[key])} here" for key in wrong]
    if wrong and not force:
        values = config_differences(archive.provenance, core_of(model)) if "config" in wrong else []
        text = "\n  ".join([*lines, *values, *_same_conditions(found, expected)])
        raise PlanError(
            f"this is not the model that {archive.path} was captured from:\n  {text}\n"
            "Load that model, in the same dtype; force=True or --force goes on with this one, and notes it."
        )
    forced = [f"another model than was captured, as force=True asked: {line}" for line in lines]
    conditions = [*_same_conditions(found, expected), *_same_layout(archive, core_of(model))]
    return Checked(identity=found, notes=(*forced, *notes, *conditions, *changed_conditions(archive.provenance)))


def _identity_here(model: nn.Module) -> tuple[dict[str, object], list[str]]:
    """Return what is known of the model here, and notes: weights that have no values anywhere cannot be told."""
    try:
        return dict(identify_model(model)), []
    except CaptureError as error:
        found: dict[str, object] = {"class": plain_class(core_of(model)).__name__}
        return found, [f"the model's weights were not compared with those of the capture: {error}"]


def _same_conditions(found: Mapping[str, object], expected: Mapping[str, object]) -> list[str]:
    return [
        f"{key}: {expected[key]} when it was captured, {found[key]} now"
        for key in ("dtype", "attention")
        if key in expected and key in found and found[key] != expected[key]
    ]


def _same_layout(archive: Archive, core: nn.Module) -> list[str]:
    described = archive.provenance.get("model")
    before = described.get("layout") if isinstance(described, Mapping) else None
    now = layout(core)
    return [f"layout: {before} when it was captured, {now} now"] if before is not None and before != now else []


def _short(value: object) -> str:
    return str(value)[:16]


@contextmanager
def running_as_captured(archive: Archive, model: nn.Module) -> Iterator[None]:
    """Let a model run as in the capture: uncompiled, evaluating, with eager attention where patterns were captured."""
    with ExitStack() as stack:
        called = runnable(model)
        stack.enter_context(running_uncompiled(called))
        stack.enter_context(evaluating(called))
        core = core_of(model)
        if isinstance(core, PreTrainedModel) and _computes_otherwise(archive, core):
            stack.enter_context(eager_attention(core))
        yield


def _computes_otherwise(archive: Archive, model: PreTrainedModel) -> bool:
    """Say whether the capture switched the model to eager attention for its patterns, and this one uses another."""
    if archive.plan.model.get("attention") != "eager" or not any(site.startswith("pattern.") for site in archive.sites):
        return False
    return bool(model.config._attn_implementation != "eager")
