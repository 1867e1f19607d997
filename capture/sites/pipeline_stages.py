"""What is tapped: a model, or the part of one that is a stage of a pipeline, and which of its runs count.

transformers' own pipelines leave stand-ins under the names of what other stages hold, which pass on what they take.
torch's ``PipelineStage`` holds a module of the user's, with a part of a transformers model in it, and runs it once on
meaningless values to learn shapes: only what happens inside ``forward_one_chunk`` is real. Users leave identities
under the names of what other stages hold.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from residua.capture.runtime.compat import PipelineStageBase
from residua.capture.runtime.pipeline_schedule import stage_model_of
from residua.capture.runtime.wrappers import core_of, named_modules
from residua.capture.sites.site import SiteInfo


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model, or as much of it as this process has.

    Attributes:
        core: The model whose sites are meant.
        parts: Its modules that are here, under the names of the whole model; under the empty name what is called.
        gives_logits: Whether what is called gives logits.
    """

    core: nn.Module
    parts: Mapping[str, nn.Module]
    gives_logits: bool = True

    def here(self, sites: Mapping[str, SiteInfo]) -> dict[str, SiteInfo]:
        """Return the sites that are met in this process; the others are in other stages of a pipeline."""
        return {
            name: info
            for name, info in sites.items()
            if info.module in self.parts and (info.via != "logits" or self.gives_logits)
        }


class Chunk:
    """The microbatch under way.

    Attributes:
        is_real: Whether what runs is the user's data.
        index: Number of the microbatch, in a torch pipeline.
    """

    def __init__(self, *, is_real: bool) -> None:
        self.is_real = is_real
        self.index: int | None = None

    @contextmanager
    def is_under_way(self, index: int | None) -> Iterator[None]:
        """Let `index` be the number of the microbatch inside: its backward pass."""
        before, self.index = self.index, index
        try:
            yield
        finally:
            self.index = before


def target_of(model: nn.Module | PipelineStageBase) -> Target:
    """Find the model inside wrappers or inside a stage of torch's pipelines."""
    if isinstance(model, PipelineStageBase):
        inner = next((m for m in model.submod.modules() if isinstance(m, PreTrainedModel)), model.submod)
        return Target(core=inner, parts=_of_stage(inner, model.submod), gives_logits=model.is_last)
    core = core_of(model)
    stage_model = stage_model_of(core)
    if stage_model is not None:
        return Target(core=core, parts=_of_stage(core, stage_model.module), gives_logits=stage_model.is_last)
    return Target(
        core=core, parts={path: part for path, part in named_modules(core).items() if not is_placeholder(part)}
    )


def _of_stage(inner: nn.Module, called: nn.Module) -> dict[str, nn.Module]:
    return {
        **{path: part for path, part in named_modules(inner).items() if not isinstance(part, nn.Identity)},
        "": called,
    }


def is_placeholder(part: nn.Module) -> bool:
    """Tell whether another stage of transformers' own pipeline holds what has this name."""
    return type(part).__name__ == "PipelineIdentityLayer"


@contextmanager
def chunks_of(model: nn.Module | PipelineStageBase) -> Iterator[Chunk]:
    """Follow which microbatch a stage of torch's pipelines runs; a model that is no stage is always real."""
    if not isinstance(model, PipelineStageBase):
        yield Chunk(is_real=True)
        return
    chunk, before = Chunk(is_real=False), vars(model).get("forward_one_chunk")
    inner = model.forward_one_chunk

    def forward_one_chunk(fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        chunk.is_real, chunk.index = True, fwd_chunk_id
        try:
            return inner(fwd_chunk_id, *args, **kwargs)
        finally:
            chunk.is_real, chunk.index = False, None

    vars(model)["forward_one_chunk"] = forward_one_chunk
    try:
        yield chunk
    finally:
        del vars(model)["forward_one_chunk"]
        if before is not None:
            vars(model)["forward_one_chunk"] = before
