"""The reference model: the unsharded model on the meta device, and the sites and shapes that it has.

A model that is distributed over processes or devices does not show the shapes of the full model: a projection has the
width of its shard, and offloaded weights are on the meta device. So the shapes are taken from a reference model, which
has the same class and config, and no weights. Models of one class and config share one reference model, which keeps the
sites that were looked up: to measure their shapes, it runs twice.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed

from residua.capture.hooks.site import SiteInfo
from residua.capture.runtime.compat import deepspeed_config, model_from_config
from residua.capture.runtime.pipeline_schedule import stage_model_of
from residua.capture.runtime.process_groups import pipeline_group
from residua.capture.runtime.sharded import plain_class
from residua.capture.runtime.wrappers import core_of
from residua.capture.sites.anatomy import Anatomy, anatomy_of
from residua.capture.sites.names_to_modules import resolve_sites
from residua.store.base.errors import CaptureError, UnknownSiteError

_MOST_KEPT = 4
_NOT_THE_SHAPE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""Values of a config that say where the weights came from, or that are given to the reference model apart."""


@dataclass(frozen=True)
class _Reference:
    """A reference model, and the sites that were looked up in it, by patterns."""

    model: PreTrainedModel
    sites: dict[tuple[str, ...], dict[str, SiteInfo]] = field(default_factory=dict)


_known: dict[object, _Reference] = {}
"""The reference models that were used last, by class, config and dtype; the latest stands last."""


def unsharded_sites(model: nn.Module, patterns: str | list[str]) -> dict[str, SiteInfo]:
    """Turn patterns into sites, with the shapes that they have in the unsharded model.

    Args:
        model: Any torch module, wrapped, sharded, split or not.
        patterns: As for `resolve_sites`.

    Returns:
        From name to site, including sites in the pipeline stages of other processes.

    Raises:
        UnknownSiteError: The model has no such site.
    """
    core = core_of(model)
    if not isinstance(core, PreTrainedModel) or not may_be_distributed(core):
        return resolve_sites(core, patterns)
    try:
        return _sites_of(_reference(core), [patterns] if isinstance(patterns, str) else patterns)
    except (UnknownSiteError, CaptureError):
        if pipeline_group(core) is not None:
            raise  # most modules of a stage are placeholders, which have no shapes
        # A module that the user added is not in the config, and some models do not run on the meta device. Then the
        # shapes are those of this process; a site that is split does not have them, and is refused later.
        return resolve_sites(core, patterns)


def unsharded_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight in the unsharded model, by name; empty if the model is not from transformers."""
    core = core_of(model)
    if not isinstance(core, PreTrainedModel):
        return {}
    return {name: tuple(tensor.shape) for name, tensor in reference_model(core).state_dict().items()}


def unsharded_anatomy(model: nn.Module) -> Anatomy | None:
    """Return the anatomy of a language model; of a torch pipeline, with the blocks of all stages."""
    stage_model = stage_model_of(core_of(model))
    if stage_model is None:
        return anatomy_of(model)
    full = anatomy_of(reference_model(stage_model.core))
    return None if full is None else replace(full, model=stage_model.core)


def may_be_distributed(core: PreTrainedModel) -> bool:
    """Return whether a model may be distributed over several processes or devices."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return several or hasattr(core, "hf_device_map")


def reference_model(core: PreTrainedModel) -> PreTrainedModel:
    """Return the reference model of a model, on the meta device: one for all models of a class, config and dtype."""
    return _reference(core).model


def _reference(core: PreTrainedModel) -> _Reference:
    config = deepcopy(core.config)
    for name in ("distributed_config", "quantization_config"):
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    values = json.loads(config.to_json_string(use_diff=False))
    shape = json.dumps({name: value for name, value in values.items() if name not in _NOT_THE_SHAPE}, sort_keys=True)
    made_of = (plain_class(core), shape, core.dtype)
    known = _known.pop(made_of) if made_of in _known else _Reference(_built(plain_class(core), config, core.dtype))
    _known[made_of] = known
    if len(_known) > _MOST_KEPT:
        del _known[next(iter(_known))]
    return known


def _built(kind: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    options: dict[str, object] = {"dtype": dtype, "attn_implementation": "eager"}
    text = config.get_text_config()
    if any(getattr(text, name, None) for name in ("num_local_experts", "num_experts")):
        options["experts_implementation"] = "batched_mm"  # the default counts tokens, which the meta device cannot
    with _without_zero3(), torch.device("meta"):
        made = model_from_config(kind, config, **options)
    nn.Module.train(made, False)
    return made


def _sites_of(reference: _Reference, patterns: list[str]) -> dict[str, SiteInfo]:
    asked = tuple(patterns)
    if asked not in reference.sites:
        reference.sites[asked] = resolve_sites(reference.model, patterns)
    return dict(reference.sites[asked])


@contextmanager
def _without_zero3() -> Iterator[None]:
    """Keep transformers from sharding a new model with ZeRO-3, as the user's DeepSpeed config may ask."""
    asked = deepspeed_config()
    hf_deepspeed.unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]  # theirs
    try:
        yield
    finally:
        if asked is not None:
            hf_deepspeed.set_hf_deepspeed_config(asked)  # type: ignore[no-untyped-call]  # theirs
