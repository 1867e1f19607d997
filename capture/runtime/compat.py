"""Every private name of torch, transformers, accelerate, PEFT and bitsandbytes that the project uses.

A private name may change in any release, so it is used here once, in a function or a constant whose
docstring says what it is and which public name is missing. `tests/capture/runtime/test_compat.py` has one test for each
name, and `pyproject.toml` bounds the versions of the libraries to those that were tested.

`Store`, `PrefixStore` and `TCPStore` are documented as names of `torch.distributed`, which does not export them to type
checkers; they are imported here from the private module that defines them.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore as PrefixStore
from torch._C._distributed_c10d import Store as Store
from torch._C._distributed_c10d import TCPStore as TCPStore
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, _PipelineSchedule
from torch.distributed.pipelining.stage import _PipelineStageBase
from torch.utils._python_dispatch import _disable_current_modes
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed

CompiledModule: TypeAlias = OptimizedModule
"""What `torch.compile` returns for a module; torch has no public name for the class."""

PipelineSchedule: TypeAlias = _PipelineSchedule
"""Base class of every pipeline schedule; torch exports its subclasses only."""

PipelineStageBase: TypeAlias = _PipelineStageBase
"""Base class of every pipeline stage, traced or not; torch exports `PipelineStage` only."""

WRAPPED_CHILDREN = ("_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_orig_mod")
"""Names under which FSDP1, fairscale's FSDP, checkpointing and `torch.compile` keep the module that they wrap; none of
them has a public name for it."""


NOT_REENTRANT = "_checkpoint_without_reentrant_generator"
"""The function of `torch.utils.checkpoint` that runs every checkpoint with ``use_reentrant=False``.

It takes the function that runs again, and yields once, while the caller runs the part. torch has no public place to
learn of it. (The reentrant kind is the public `CheckpointFunction`.)
"""


def in_backward() -> bool:
    """Return whether this thread is in a backward pass; torch has no public function for it."""
    return torch._C._current_graph_task_id() != -1


def without_dispatch_modes() -> AbstractContextManager[Any]:
    """Return a context that no dispatch mode sees, such as those of selective checkpointing; none is public."""
    return _disable_current_modes()


def is_compiled_in_place(module: nn.Module) -> bool:
    """Return whether `module.compile()` was called; torch has no public attribute for it."""
    return module._compiled_call_impl is not None


def is_compiled_function(value: object) -> bool:
    """Return whether `torch.compile` made a function or bound method; torch has no public test for it."""
    return callable(value) and hasattr(value, "_torchdynamo_orig_callable")


_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})/")
_FLEX = (  # the names under which transformers calls what it compiles for flex attention
    ("transformers.integrations.flex_attention", "compile_friendly_flex_attention"),
    ("transformers.masking_utils", "create_block_mask"),
)


@contextmanager
def compiled_flex_attention() -> Iterator[None]:
    """Let transformers' flex attention run compiled where torch's stance forbids it to all other code.

    Uncompiled it makes all scores, (examples, heads, queries, keys). transformers has no public place to exempt it.
    """

    def exempt(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.compiler.set_stance("default"):
                return function(*args, **kwargs)

        return run

    found = [(sys.modules[home], name) for home, name in _FLEX if hasattr(sys.modules.get(home), name)]
    before = [getattr(home, name) for home, name in found]
    for (home, name), function in zip(found, before, strict=True):
        setattr(home, name, exempt(function))
    try:
        yield
    finally:
        for (home, name), function in zip(found, before, strict=True):
            setattr(home, name, function)


def children_by_name(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """Return the children of a module; unlike the public `named_children`, this costs no time for each child."""
    return module._modules


def default_store() -> Store:
    """Return the store of the default process group; torch has no public function for it."""
    return _get_default_store()


def stage_of(schedule: PipelineScheduleSingle) -> PipelineStageBase:
    """Return the stage that a schedule runs; torch has no public attribute for it."""
    return schedule._stage


def n_microbatches_of(schedule: PipelineScheduleSingle) -> int:
    """Return the number of microbatches of a schedule; torch has no public attribute for it."""
    return schedule._n_microbatches


def fsdp_meshes(module: FSDPModule) -> Iterator[DeviceMesh]:
    """Yield the meshes over which FSDP2 shards a module's parameters; torch has no public attribute for them."""
    for group in module._get_fsdp_state()._fsdp_param_groups:
        yield group.mesh_info.mesh


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """Return the name of the attention implementation of a config; transformers has only a setter, of models."""
    return cast("str | None", config._attn_implementation)


def set_attention_implementation(config: PreTrainedConfig, name: str | None) -> None:
    """Set the attention implementation of one config; `PreTrainedModel.set_attn_implementation` refuses some names."""
    config._attn_implementation = name


def lacks_final_norm(config: PreTrainedConfig) -> bool:
    """Return whether an OPT config removes the final norm; transformers has no public attribute for it."""
    return bool(config._remove_final_layer_norm)


def model_revision(config: PreTrainedConfig | None) -> str | None:
    """Return the commit of the hub that a config came from, None if neither it nor its folder says.

    transformers has no public attribute for it, and since 5.23 sets none: it resolves the revision before loading. The
    hub's cache has a folder for each commit, ``snapshots/COMMIT``.
    """
    known = getattr(config, "_commit_hash", None)
    return known or commit_of_folder(getattr(config, "name_or_path", None) or "")


def set_model_revision(config: PreTrainedConfig, commit: str | None) -> None:
    """Keep the commit of the hub that a config came from, where `model_revision` finds it."""
    config._commit_hash = commit


def commit_of_folder(path: str) -> str | None:
    """Return the commit that a path inside the hub's cache names, None of any other path."""
    found = _SNAPSHOT.search(Path(path).as_posix() + "/")
    return found[1] if found else None


def model_from_config(kind: type[PreTrainedModel], config: PreTrainedConfig, **options: object) -> PreTrainedModel:
    """Build a model from its config; the public `AutoModel.from_config` does not take the model's class."""
    model: PreTrainedModel = kind._from_config(config, **options)  # type: ignore[no-untyped-call]  # it has no annotations
    return model


def merged_generation_config(
    model: Any, config: GenerationConfig | None, options: Mapping[str, object]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Return the settings with which ``model.generate(generation_config=config, **options)`` runs.

    They come from the options, the config, the model's own config and transformers' defaults. transformers has no
    public function for it. The second value holds the options that are no settings.
    """
    merged, others = model._prepare_generation_config(config, **options)
    return merged, others


def deepspeed_config() -> Any:
    """Return the DeepSpeed config that the user gave transformers, None if none; the module has only setters."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    return None if reference is None else reference()


def pipeline_stage_of(model: nn.Module) -> Any:
    """Return the stage of transformers' own pipeline, None if there is none; the model has no public attribute."""
    return getattr(model, "_pp_stage", None)


def device_meshes_of(model: nn.Module) -> Any:
    """Return the meshes over which transformers split a model, None if it did not; there is no public attribute."""
    return getattr(model, "_mesh_manager", None)


def accelerate_hook(module: nn.Module) -> Any:
    """Return the hook that accelerate put on a module, None if there is none; accelerate has no public attribute."""
    return getattr(module, "_hf_hook", None)


def forward_hooks_of(module: nn.Module) -> list[Any]:
    """Return the functions that run before and after a module's forward; torch has no public attribute for them."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; torch has no public name for its counter."""
    return tensor._version


PLAIN_CALL = ("__call__", "_encode_plus", "_batch_encode_plus", "set_truncation_and_padding")
"""The methods in which `transformers.TokenizersBackend` turns texts into ids; the middle two, of which a version of
transformers has one or both, have no public name."""

ADAPTER_STATE = {"active adapters": "_active_adapter", "adapters disabled": "_disable_adapters"}
"""The attributes of a layer with adapters, of either kind that PEFT has, that say which are on."""


def has_state_without_length(model: object) -> bool:
    """Return whether a model keeps a state, such as Mamba's, that does not say how many positions it holds.

    transformers has no public attribute for it.
    """
    return bool(getattr(model, "_is_stateful", False))


def unpacked_codes(codes: Tensor, state: Any) -> Tensor:
    """Return the codes of a 4-bit weight as they were before a run on a CPU packed them; `state` is changed.

    bitsandbytes has no public function for it.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    unpacked: Tensor = _convert_weight_packed_for_cpu_inverse(codes, state)[0]
    return unpacked
