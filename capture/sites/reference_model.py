"""The sites of a whole model, whatever part of it this process holds.

A model that is spread over processes or devices cannot be asked for its own shapes: a projection knows the width of
its shard, and weights may lie on meta. So its unsharded twin is asked: the same class and config on meta,
without weights.
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

from residua.capture.runtime.compat import deepspeed_config, model_from_config
from residua.capture.runtime.pipeline_schedule import stage_model_of
from residua.capture.runtime.process_groups import pipeline_group
from residua.capture.runtime.wrappers import core_of
from residua.capture.sites.anatomy import Anatomy, anatomy_of
from residua.capture.sites.names_to_modules import resolve_sites
from residua.capture.sites.site import SiteInfo
from residua.store.base.errors import CaptureError, UnknownSiteError

_twins: WeakKeyDictionary[nn.Module, PreTrainedModel] = WeakKeyDictionary()


def unsharded_sites(model: nn.Module, patterns: str | list[str]) -> dict[str, SiteInfo]:
    """Turn patterns into sites, with the shapes that they have in the unsharded model.

    Args:
        model: Any torch module, wrapped, sharded, split or not.
        patterns: As for `resolve_sites`.

    Returns:
        From name to site; sites of pipeline stages that other processes hold are among them.

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
            raise  # a stage has stand-ins for most of the model, which have no shapes
        # A module that was put in by hand is in no config, and some models do not run on meta. Shapes are then those
        # of this process: what is split does not fit them, and is refused.
        return resolve_sites(core, patterns)


def unsharded_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight in the unsharded model, by name; nothing where there is no such twin."""
    core = core_of(model)
    if not isinstance(core, PreTrainedModel):
        return {}
    return {name: tuple(tensor.shape) for name, tensor in reference_model(core).state_dict().items()}


def unsharded_anatomy(model: nn.Module) -> Anatomy | None:
    """Find the parts of a language model as `anatomy_of` does, with all of its blocks if this is a part of it."""
    stage_model = stage_model_of(core_of(model))
    if stage_model is None:
        return anatomy_of(model)
    whole = anatomy_of(reference_model(stage_model.core))
    return None if whole is None else replace(whole, model=stage_model.core)


def may_be_distributed(core: PreTrainedModel) -> bool:
    """Tell whether a model may lie on several processes or devices."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return several or hasattr(core, "hf_device_map")


def reference_model(core: PreTrainedModel) -> PreTrainedModel:
    """Return the unsharded twin of a model, on meta; made once."""
    if core not in _twins:
        config = deepcopy(core.config)
        for name in ("distributed_config", "quantization_config"):
            if getattr(config, name, None) is not None:
                setattr(config, name, None)
        options: dict[str, object] = {"dtype": core.dtype, "attn_implementation": "eager"}
        text = config.get_text_config()
        if any(getattr(text, name, None) for name in ("num_local_experts", "num_experts")):
            options["experts_implementation"] = "batched_mm"  # the default counts tokens, which meta cannot
        with _without_zero3(), torch.device("meta"):
            twin = model_from_config(_class_of(core), config, **options)
        nn.Module.train(twin, False)
        _twins[core] = twin
    return _twins[core]


@contextmanager
def _without_zero3() -> Iterator[None]:
    """Keep transformers from cutting up a new model by ZeRO-3, where the user's configuration asks for it."""
    asked = deepspeed_config()
    hf_deepspeed.unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]  # theirs
    try:
        yield
    finally:
        if asked is not None:
            hf_deepspeed.set_hf_deepspeed_config(asked)  # type: ignore[no-untyped-call]  # theirs


def _class_of(core: PreTrainedModel) -> type[PreTrainedModel]:
    """The class as it was before FSDP2 put its own in front."""
    return next(
        kind
        for kind in type(core).__mro__
        if issubclass(kind, PreTrainedModel) and "fsdp" not in kind.__module__ and kind.__name__[:4] != "FSDP"
    )
