"""Where the numbers came from: everything that one needs to capture the same rows again."""

import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import cast

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from residua.capture.identity.fingerprint import weights_fingerprint
from residua.capture.layout.process_layout import describe_process_layout, spans_processes
from residua.capture.runtime.compat import attention_implementation, model_revision
from residua.capture.runtime.pipeline_schedule import runnable
from residua.capture.runtime.sharded import is_sharded, is_zero3, plain_class
from residua.capture.runtime.wrappers import core_of, running_uncompiled
from residua.capture.sites.attention import eager_attention
from residua.capture.sites.shape_probe import evaluating
from residua.store.base.canonical import Json, digest_of, flatten
from residua.store.base.errors import CaptureError, PlanError
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
    return version(name)  # which reads files of the package each time


def changed_conditions(provenance: Mapping[str, object]) -> tuple[str, ...]:
    """Return one sentence for each condition of `provenance` that is another here, now."""
    here, there = flatten(environment()), flatten(provenance)
    return tuple(
        f"{key}: {there[key]} when it was captured, {value} now"
        for key, value in here.items()
        if key in there and there[key] != value
    )


def identify_model(model: nn.Module) -> dict[str, Json]:
    """Return what makes a model this model, wherever it lies and whatever is around it: the plan's `model` entry."""
    core = core_of(model)
    return {
        "class": plain_class(core).__name__,
        # FSDP1 brings weights together from the outermost wrapper on
        "weights": weights_fingerprint(model if isinstance(model, FullyShardedDataParallel) else core),
        "config": _config_digest(core),
        "dtype": str(next(core.parameters()).dtype).removeprefix("torch."),
        "attention": _attention(core),
    }


def describe_model(model: nn.Module, identity: Mapping[str, Json]) -> dict[str, Json]:
    """Return where the model came from, on what it ran, and its `identity`: provenance."""
    model = core_of(model)
    devices = {parameter.device for parameter in model.parameters()}
    names = sorted(torch.cuda.get_device_name(d) if d.type == "cuda" else d.type for d in devices)
    config = model.config if isinstance(model, PreTrainedModel) else None
    return {
        "id": getattr(config, "name_or_path", "") or "",
        "revision": model_revision(config),
        "devices": cast("list[Json]", names),
        "layout": layout(model),
        "config_values": _config_values(model),
        **identity,
    }


def identify_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Json]:
    """Return the name of a tokenizer and the SHA-256 of its vocabulary and rules (of its vocabulary, if it is slow)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    if backend is not None:
        content = {name: part for name, part in content.items() if name not in ("padding", "truncation")}
    return {"id": tokenizer.name_or_path, "sha256": digest_of(content)}


def layout(model: nn.Module) -> str:
    """Return how a model is spread over processes, for people."""
    parts = [describe_process_layout(model)] if spans_processes(model) else []
    return " x ".join([*parts, *(["zero3" if is_zero3(model) else "fsdp2"] if is_sharded(model) else [])]) or "single"


def changed_layout(provenance: Mapping[str, object], model: nn.Module) -> tuple[str, ...]:
    """Return a sentence if a model lies otherwise than when `provenance` was written; none if that does not say."""
    described = provenance.get("model")
    then = described.get("layout") if isinstance(described, Mapping) else None
    now = layout(model)
    if then in (None, now):
        return ()
    return (f"layout of the model: {then} when it was captured, {now} now: values are rounded in another order",)


def _attention(model: nn.Module) -> str | None:
    return attention_implementation(model.config) if isinstance(model, PreTrainedModel) else None


def config_differences(provenance: Mapping[str, object], model: nn.Module) -> list[str]:
    """Return one line for each value of the model's config that is another than in `provenance`."""
    described = provenance.get("model")
    there = described.get("config_values") if isinstance(described, Mapping) else None
    if not isinstance(there, Mapping):
        return []
    before, now = flatten(there), flatten(_config_values(model))
    return [
        f"model.config.{key}: the archive has {before.get(key, 'nothing')!r}, this run has {now.get(key, 'nothing')!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _config_digest(model: nn.Module) -> str:
    return digest_of(_config_values(model) if isinstance(model, PreTrainedModel) else str(model))


def _config_values(model: nn.Module) -> dict[str, Json]:
    """Return what of a transformers model's config is the model's, and not this library's or this machine's."""
    if not isinstance(model, PreTrainedModel):
        return {}
    values = json.loads(model.config.to_json_string(use_diff=True))
    return {key: value for key, value in values.items() if key not in _NOT_THE_MODEL}


_IDENTITY = ("class", "weights", "config")  # the other entries are conditions under which the same model runs


@dataclass(frozen=True, kw_only=True)
class ModelCheck:
    """What comparing a model with an archive found.

    Attributes:
        identity: What is known of the model here, as in the plan's `model` entry.
        notes: One sentence for each thing that differs.
    """

    identity: Mapping[str, object]
    notes: tuple[str, ...]


def check_model(archive: Archive, model: nn.Module, *, force: bool = False) -> ModelCheck:
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
    return ModelCheck(identity=found, notes=(*forced, *notes, *conditions, *changed_conditions(archive.provenance)))


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
    return attention_implementation(model.config) != "eager"
