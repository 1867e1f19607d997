"""Which model this is, where the numbers came from, and whether a model is the one that an archive was captured from.

The identity of a model (class, weights, config, dtype, attention) stands in the plan. The provenance adds what the
numbers depend on: package versions, processor, threads, and how the model was spread over processes.
"""

import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import chain
from typing import cast

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from residua.capture.hooks.attention import eager_attention
from residua.capture.identity.fingerprint import known_fingerprint, weights_fingerprint
from residua.capture.identity.module_settings import adapters_of, compare_settings, module_settings
from residua.capture.identity.output import OutputSample, compare_outputs, output_sample
from residua.capture.identity.prediction import Prediction
from residua.capture.layout.process_layout import describe_process_layout, spans_processes
from residua.capture.runtime.compat import attention_implementation, model_revision
from residua.capture.runtime.pipeline_schedule import runnable
from residua.capture.runtime.sharded import plain_class
from residua.capture.runtime.wrappers import core_of, evaluating, running_uncompiled
from residua.store.base.canonical import Json, differences, digest_of, flatten
from residua.store.base.errors import CaptureError, PlanError
from residua.store.base.naming import named
from residua.store.format.archive_metadata import said_of
from residua.store.format.site_names import is_pattern
from residua.store.read.archive import Archive

PACKAGES = ("residua", "torch", "transformers", "accelerate", "tokenizers", "zarr", "numcodecs", "numpy", "pyarrow")
_NOT_THE_MODEL = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "architectures",
    "distributed_config",
)
_IDENTITY = ("class", "weights", "config")
_CONDITIONS = ("dtype", "attention")  # under which the same model may run
_DIGEST_DIGITS = 64
_MOST_LINES = 8
_VERSIONS = ("packages.torch:", "packages.transformers:")


def environment() -> dict[str, Json]:
    """Return the package versions, processor and thread count that the numbers depend on."""
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,  # type: ignore[no-untyped-call]  # bare
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


@cache
def _version(name: str) -> str:
    return version(name)  # reads files of the package each time


def identify_model(model: nn.Module, output: OutputSample | str = "") -> dict[str, Json]:
    """Return the plan's `model` entry: the same on every device, under every wrapper, in every layout.

    A collective of all processes that hold the model.

    Args:
        model: The model.
        output: What it computes now, as `output_sample` says; then weights that have not changed are not read again.

    Raises:
        CaptureError: A weight has no values, since it lies on the meta device.
    """
    core = core_of(model)
    holder = model if isinstance(model, FullyShardedDataParallel) else core  # FSDP1 gathers weights itself
    return {
        "class": plain_class(core).__name__,
        "weights": known_fingerprint(holder, output.sha256)
        if isinstance(output, OutputSample)
        else weights_fingerprint(holder),
        "config": digest_of(_config_values(core) if isinstance(core, PreTrainedModel) else str(core)),
        "dtype": _dtype(core),
        "attention": _attention(core),
    }


def _attention(core: nn.Module) -> str | None:
    return attention_implementation(core.config) if isinstance(core, PreTrainedModel) else None


def _dtype(core: nn.Module) -> str | None:
    """Return the type of the first parameter, or buffer of a module without parameters; None if it has neither."""
    first = next(chain(core.parameters(), core.buffers()), None)
    return None if first is None else str(first.dtype).removeprefix("torch.")


def describe_model(
    model: nn.Module,
    identity: Mapping[str, Json],
    output: OutputSample | str | None = None,
    *,
    predicts: Prediction | None = None,
) -> dict[str, Json]:
    """Return the provenance of a model: where it came from, what it ran on, and which one it is.

    Args:
        model: The model.
        identity: As `identify_model` says.
        output: What it computes, as `output_sample` says; None if that was not found out.
        predicts: What its logits are of, as `prediction_of` says.
    """
    adapters = adapters_of(model)
    model = core_of(model)
    config = model.config if isinstance(model, PreTrainedModel) else None
    return {
        "id": getattr(config, "name_or_path", "") or "",
        "revision": model_revision(config),
        "devices": _device_names(model),
        "layout": describe_process_layout(model),
        "config_values": _config_values(model),
        "adapters": adapters or None,
        "settings": None if spans_processes(model) else module_settings(model),  # each process has its own
        "output": output.to_json() if isinstance(output, OutputSample) else output,
        "predicts": predicts,
        **identity,
    }


def _device_names(model: nn.Module) -> list[Json]:
    devices = {parameter.device for parameter in model.parameters()}
    return cast("list[Json]", sorted(torch.cuda.get_device_name(d) if d.type == "cuda" else d.type for d in devices))


def identify_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Json]:
    """Return the name of a tokenizer and the SHA-256 of its vocabulary and rules; of a slow one, of its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    if backend is not None:
        content = {name: value for name, value in content.items() if name not in ("padding", "truncation")}
    return {"id": tokenizer.name_or_path, "sha256": digest_of(content)}


def _config_values(model: nn.Module) -> dict[str, Json]:
    """Return the config of a transformers model, without what belongs to the library or to this machine."""
    if not isinstance(model, PreTrainedModel):
        return {}
    values = json.loads(model.config.to_json_string(use_diff=True))
    return {key: value for key, value in values.items() if key not in _NOT_THE_MODEL}


def changed_conditions(provenance: Mapping[str, object], model: nn.Module | None = None) -> tuple[str, ...]:
    """Return one sentence for each condition that differs from `provenance`: the environment, the model's layout.

    Args:
        provenance: The provenance of an archive.
        model: The model whose layout is compared, if it matters.
    """
    here, there = flatten(environment()), flatten(provenance)
    changed = [
        f"{key}: {there[key]} when it was captured, {value} now"
        for key, value in here.items()
        if key in there and there[key] != value
    ]
    then = said_of("model", provenance).get("layout")
    if model is not None and then not in (None, now := describe_process_layout(core_of(model))):
        changed.append(
            f"layout of the model: {then} when it was captured, {now} now, so values are rounded in another order"
        )
    return tuple(changed)


def config_differences(provenance: Mapping[str, object], model: nn.Module) -> list[str]:
    """Return one line for each value of the model's config that differs from `provenance`."""
    there = said_of("config_values", said_of("model", provenance))
    if not there:
        return []
    before, now = (flatten(values, "model.config.") for values in (there, _config_values(model)))
    return differences(before, now, ("the archive", "this run"))


def adapter_differences(provenance: Mapping[str, object], model: nn.Module) -> list[str]:
    """Return one line for each thing in which adapters and settings differ, at most a few: weights say no more.

    Call this for a model whose weights are others; `compare_behaviour` says everything of one whose weights are equal.
    """
    described = said_of("model", provenance)
    if not described or spans_processes(core_of(model)):
        return []
    then, now = described.get("adapters") or {}, adapters_of(model)
    lines, same = list[str](), isinstance(then, Mapping) and set(then) == set(now)
    if isinstance(then, Mapping) and not same:
        lines.append(f"adapters: {_listed(then)} in the archive, {_listed(now)} here")
    if before := said_of("settings", described):
        lines += compare_settings(before, module_settings(core_of(model)), both=not same).attributes
    return lines if len(lines) <= _MOST_LINES else [*lines[:_MOST_LINES], f"and {len(lines) - _MOST_LINES} more"]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


@dataclass(frozen=True, kw_only=True)
class BehaviourComparison:
    """How what a model computes with and gives differs from the captured one, one sentence each.

    Attributes:
        wrong: What only another model explains.
        notes: What rounding explains, or what cannot be told from here.
    """

    wrong: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def compare_behaviour(
    provenance: Mapping[str, object], model: nn.Module, output: OutputSample | str
) -> BehaviourComparison:
    """Compare a model's settings and its output on a few tokens with those of the capture.

    Args:
        provenance: The provenance of the archive; those of former versions have neither.
        model: The model here.
        output: What it computes here, as `output_sample` says.
    """
    described = said_of("model", provenance)
    if not described:
        return BehaviourComparison()
    core, changed = core_of(model), changed_conditions(provenance, model)
    same_layout = described.get("layout") == describe_process_layout(core)
    same_versions = not any(line.startswith(_VERSIONS) for line in changed)
    wrong, notes = list[str](), list[str]()
    then = OutputSample.from_json(described.get("output"))
    found = None
    if then is not None and isinstance(output, OutputSample):
        same = not changed and described.get("devices") == _device_names(core)
        same = same and described.get("attention") == _attention(core)
        found = compare_outputs(then, output, same_conditions=same)
        if found.text:
            (wrong if found.is_other else notes).append(found.text)
    elif then is not None:
        notes.append(f"the model's output was not compared with that of the captured model: {output}")
    before = said_of("settings", described)
    if before and same_layout and not spans_processes(core):
        settings = compare_settings(before, module_settings(core), both=not same_versions)
        (wrong if same_versions else notes).extend(settings.attributes)
        if found is None or not found.is_equal:  # a hook may only look: the output says whether it changes anything
            (wrong if found is not None and found.is_other else notes).extend(settings.hooks)
    return BehaviourComparison(wrong=tuple(wrong), notes=tuple(notes))


@dataclass(frozen=True, kw_only=True)
class ModelCheck:
    """The result of comparing a model with an archive.

    Attributes:
        identity: What is known of the model here, as in the plan's `model` entry.
        notes: One sentence for each thing that differs.
    """

    identity: Mapping[str, Json]
    notes: tuple[str, ...]


def check_model(archive: Archive, model: nn.Module, *, force: bool = False, exact: bool = False) -> ModelCheck:
    """Compare a model, and the conditions here, with those of the capture.

    Args:
        archive: The archive.
        model: The model, on its device.
        force: Accept another model, with a note.
        exact: Also refuse another dtype or attention, and a model whose weights have no values.

    Raises:
        PlanError: It is another model.
        CaptureError: With `exact`: a weight has no values.
    """
    expected, notes = archive.plan.model, list[str]()
    output = output_sample(model)
    try:
        found = identify_model(model, output)
    except CaptureError as error:
        if exact:
            raise
        found = {"class": plain_class(core_of(model)).__name__}
        notes.append(f"the model's weights were not compared with those of the capture: {error}")
    wrong = [
        key
        for key in (expected if exact else _IDENTITY)
        if key in expected and found.get(key) != expected[key] and (exact or key in found)
    ]
    conditions = [
        f"{key}: {expected[key]} when it was captured, {found[key]} now"
        for key in _CONDITIONS
        if key in expected and key in found and found[key] != expected[key]
    ]
    lines = [f"{key}: {_shown(expected[key])} in the archive, {_shown(found.get(key))} here" for key in wrong]
    behaviour = BehaviourComparison() if wrong else compare_behaviour(archive.provenance, model, output)
    lines += behaviour.wrong or (adapter_differences(archive.provenance, model) if "weights" in wrong else [])
    if lines and not force:
        values = config_differences(archive.provenance, core_of(model)) if "config" in wrong else []
        listed = "\n  ".join([*lines, *values, *([] if exact else conditions)])
        remedy = "" if exact else f"; or go on with this model by {named('force', True)}, which is noted"
        raise PlanError(
            f"this is not the model that {archive.place} was captured from:\n  {listed}\n"
            f"Load that model, in the same dtype{remedy}."
        )
    forced = [f"another model than the captured one, as force=True allowed: {line}" for line in lines]
    changed = changed_conditions(archive.provenance, model)
    return ModelCheck(identity=found, notes=(*forced, *notes, *conditions, *changed, *behaviour.notes))


def _shown(value: Json) -> str:
    """Return a value of a model's identity for a message; only the first digits of a SHA-256."""
    text = str(value)
    return text[:16] if len(text) == _DIGEST_DIGITS else text


@contextmanager
def running_as_captured(archive: Archive, model: nn.Module) -> Iterator[None]:
    """Let a model run as in the capture: uncompiled, in evaluation mode, with eager attention if it has patterns."""
    core, called = core_of(model), runnable(model)
    has_patterns = any(is_pattern(site) for site in archive.sites)
    eager = eager_attention(core) if has_patterns and isinstance(core, PreTrainedModel) else nullcontext()
    with running_uncompiled(called), evaluating(called), eager:
        yield
