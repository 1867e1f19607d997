"""The reference model: the unsharded model on the meta device, and the sites and shapes that it has.

A model that is distributed over processes or devices does not show the shapes of the full model: a projection has the
width of its shard, and offloaded weights are on the meta device. So the shapes are taken from a reference model, which
has the same class and config, and no weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
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

_reference_models: WeakKeyDictionary[nn.Module, tuple[object, PreTrainedModel]] = WeakKeyDictionary()


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
        return resolve_sites(reference_model(core), patterns)
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
    """Return the reference model of a model, on the meta device; it is built anew if its config or type changed."""
    made_of = (core.config.to_json_string(use_diff=False), core.dtype)
    known = _reference_models.get(core)
    if known is None or known[0] != made_of:
        config = deepcopy(core.config)
        for name in ("distributed_config", "quantization_config"):
            if getattr(config, name, None) is not None:
                setattr(config, name, None)
        options: dict[str, object] = {"dtype": core.dtype, "attn_implementation": "eager"}
        text = config.get_text_config()
        if any(getattr(text, name, None) for name in ("num_local_experts", "num_experts")):
            options["experts_implementation"] = "batched_mm"  # the default counts tokens, which the meta device cannot
        with _without_zero3(), torch.device("meta"):
            made = model_from_config(plain_class(core), config, **options)
        nn.Module.train(made, False)
        known = _reference_models[core] = made_of, made
    return known[1]


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
