"""The modules of a model that are in this process, and which runs of a pipeline stage count.

transformers' own pipelines put placeholders, which return their input, under the names of modules that other stages
hold. torch's ``PipelineStage`` holds a module of the user's with a transformers model in it, in which identities stand
for the modules of other stages; it first runs the module on random values to find shapes, so only what runs inside
``forward_one_chunk`` is the user's data.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from residua.capture.hooks.site import SiteInfo
from residua.capture.runtime.compat import PipelineStageBase
from residua.capture.runtime.instance_attributes import instance_attribute
from residua.capture.runtime.pipeline_schedule import stage_model_of
from residua.capture.runtime.wrappers import core_of, named_modules


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model, or the modules of it that this process has.

    Attributes:
        core: The model whose sites are read.
        modules: Its modules in this process, under their names in the full model; under the empty name the module
            that is called.
        gives_logits: Whether the module that is called returns logits.
    """

    core: nn.Module
    modules: Mapping[str, nn.Module]
    gives_logits: bool = True

    def here(self, sites: Mapping[str, SiteInfo]) -> dict[str, SiteInfo]:
        """Return the sites that this process has; other sites are in other stages of a pipeline."""
        return {
            name: info
            for name, info in sites.items()
            if info.module in self.modules and (info.via != "logits" or self.gives_logits)
        }


class Microbatch:
    """The microbatch that a stage runs.

    Attributes:
        is_real: Whether it is the user's data.
        index: Its number, in a torch pipeline; None elsewhere.
    """

    def __init__(self, *, is_real: bool) -> None:
        self.is_real = is_real
        self.index: int | None = None

    @contextmanager
    def running(self, index: int | None) -> Iterator[None]:
        """Let `index` be the number of the microbatch while the context lasts, which is its backward pass."""
        before, self.index = self.index, index
        try:
            yield
        finally:
            self.index = before


def target_of(model: nn.Module | PipelineStageBase) -> Target:
    """Find the model inside wrappers, or inside a stage of a torch pipeline."""
    if isinstance(model, PipelineStageBase):
        inner = next((m for m in model.submod.modules() if isinstance(m, PreTrainedModel)), model.submod)
        return Target(core=inner, modules=_of_stage(inner, model.submod), gives_logits=model.is_last)
    core = core_of(model)
    stage_model = stage_model_of(core)
    if stage_model is not None:
        return Target(core=core, modules=_of_stage(core, stage_model.module), gives_logits=stage_model.is_last)
    here = {path: module for path, module in named_modules(core).items() if not is_placeholder(module)}
    return Target(core=core, modules=here)


def _of_stage(inner: nn.Module, called: nn.Module) -> dict[str, nn.Module]:
    return {
        **{path: module for path, module in named_modules(inner).items() if not isinstance(module, nn.Identity)},
        "": called,
    }


def is_placeholder(module: nn.Module) -> bool:
    """Return whether a module stands for one that another stage of transformers' own pipeline holds."""
    return type(module).__name__ == "PipelineIdentityLayer"


@contextmanager
def microbatches_of(model: nn.Module | PipelineStageBase) -> Iterator[Microbatch]:
    """Follow which microbatch a stage of a torch pipeline runs; any other model always runs the user's data."""
    if not isinstance(model, PipelineStageBase):
        yield Microbatch(is_real=True)
        return
    microbatch, inner = Microbatch(is_real=False), model.forward_one_chunk

    def forward_one_chunk(fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        microbatch.is_real, microbatch.index = True, fwd_chunk_id
        try:
            return inner(fwd_chunk_id, *args, **kwargs)
        finally:
            microbatch.is_real, microbatch.index = False, None

    with instance_attribute(model, "forward_one_chunk", forward_one_chunk):
        yield microbatch
