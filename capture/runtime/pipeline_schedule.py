"""Pipeline schedules of torch: a stage as a model that a capture or a replay runs together with the other stages.

A torch schedule accepts only the shapes of its first microbatch, but the batches of a capture have many shapes. So a
capture runs the stage's module itself, and sends and receives as the forward passes of a schedule do: one microbatch
after the other, while each stage works on a different one. A stage announces each new shape to the next stage, so
microbatches may differ in size, and no batch is padded.

Pipeline schedules: GPipe, Huang et al. 2019, arXiv:1811.06965; 1F1B, Narayanan et al. 2019 (PipeDream).
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from residua.capture.runtime.collectives import on_rank
from residua.capture.runtime.compat import PipelineSchedule, PipelineStageBase, n_microbatches_of, stage_of
from residua.capture.runtime.wrappers import replica_of
from residua.store.base.errors import CaptureError, PlanError

_Announced = list[tuple[tuple[int, ...], torch.dtype]]


class StageModel(nn.Module):
    """This process's stage as a model. Every stage of the pipeline has to be called with the same microbatches.

    Args:
        stage: The stage.
        n_microbatches: Number of microbatches into which a batch is divided.

    Attributes:
        module: The module that the stage runs.
        core: The transformers model in it, of which it has some blocks.
        n_microbatches: As given.
        group: The processes of the pipeline.
        is_last: Whether the module's output is the pipeline's output.

    Raises:
        PlanError: A rank has several stages, or there is no transformers model in the module.
    """

    def __init__(self, stage: PipelineStage, n_microbatches: int) -> None:
        super().__init__()
        if stage.num_stages != stage.group_size:
            raise PlanError(
                f"the pipeline has {stage.num_stages} stages on {stage.group_size} ranks, and a capture takes one "
                "stage on each rank: give each rank its blocks as one stage, with ScheduleGPipe or Schedule1F1B"
            )
        self.module = replica_of(stage.submod)
        self.core = _transformers_model(self.module)
        self.n_microbatches = n_microbatches
        self.group = stage.group or dist.group.WORLD
        self.is_last = stage.is_last
        self._is_first = stage.is_first
        self._rank, self._device = stage.group_rank, stage.device
        self._announced: dict[tuple[int, ...], _Announced] = {}
        taken = inspect.signature(self.module.forward).parameters.values()
        self._takes = None if any(p.kind is p.VAR_KEYWORD for p in taken) else {p.name for p in taken}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, use_cache: bool) -> Any:
        """Run one microbatch through this stage: receive the previous stage's output, send this stage's output.

        Args:
            input_ids: (examples, positions); the first stage's module gets it as its positional argument.
            attention_mask: (examples, positions); like the arguments below, it goes to modules that name it.
            position_ids: (examples, positions).
            use_cache: Whether the model keeps keys and values.

        Raises:
            CaptureError: There is padding, and the module takes no mask; or its output is not plain tensors.
        """
        shape = tuple(input_ids.shape)
        entering = (input_ids,) if self._is_first else self._received(shape)
        named = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        leaving = self.module(*entering, **self._taken(named))
        if not self.is_last:
            self._send(shape, leaving)
        return leaving

    def to_all(self, tensors: Sequence[Tensor] | None) -> list[Tensor]:
        """Return the last stage's tensors on every stage; a collective of the stages.

        Args:
            tensors: The tensors of the last stage; ignored on other stages.
        """
        mine = tensors if self.is_last and tensors is not None else []
        said: list[Any] = [[(tuple(tensor.shape), tensor.dtype) for tensor in mine]]
        last = dist.get_world_size(self.group) - 1
        dist.broadcast_object_list(said, group=self.group, group_src=last, device=self._device)
        given = list(mine) or [torch.empty(size, dtype=dtype, device=self._device) for size, dtype in said[0]]
        contiguous = [tensor.contiguous() for tensor in given]
        for tensor in contiguous:
            dist.broadcast(tensor, group=self.group, group_src=last)
        return contiguous

    def _taken(self, named: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._takes is None:
            return named
        if "attention_mask" not in self._takes and not named["attention_mask"].all():
            raise CaptureError(
                f"the forward of {type(self.module).__name__}{on_rank()}, a stage of the pipeline, takes no "
                "attention_mask, and the batch has examples of several lengths: let it take attention_mask (1 for a "
                "token, 0 for padding), or set batch_tokens to 1, so that every example runs alone"
            )
        return {name: value for name, value in named.items() if name in self._takes}

    def _received(self, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        if shape not in self._announced:
            said: list[Any] = [None]
            dist.recv_object_list(said, group=self.group, group_src=self._rank - 1, device=self._device)
            self._announced[shape] = said[0]
        tensors = [torch.empty(size, dtype=dtype, device=self._device) for size, dtype in self._announced[shape]]
        for tensor in tensors:
            dist.recv(tensor, group=self.group, group_src=self._rank - 1)
        return tuple(tensors)

    def _send(self, shape: tuple[int, ...], leaving: Any) -> None:
        tensors = tuple(leaving) if isinstance(leaving, tuple | list) else (leaving,)
        wrong = [type(each).__name__ for each in tensors if not isinstance(each, Tensor) or isinstance(each, DTensor)]
        if wrong:
            raise CaptureError(
                f"{type(self.module).__name__}{on_rank()}, a stage of the pipeline, returns a {wrong[0]}: a capture "
                "takes a plain tensor or a tuple of plain tensors. Return these (for a DTensor, its full_tensor())"
            )
        if shape not in self._announced:
            self._announced[shape] = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
            dist.send_object_list(
                [self._announced[shape]], group=self.group, group_dst=self._rank + 1, device=self._device
            )
        for tensor in tensors:
            dist.send(tensor.contiguous(), group=self.group, group_dst=self._rank + 1)


def _transformers_model(module: nn.Module) -> PreTrainedModel:
    found = next((inner for inner in module.modules() if isinstance(inner, PreTrainedModel)), None)
    if found is None:
        raise PlanError(
            f"a stage of the pipeline runs a {type(module).__name__} without a transformers model in it: keep the "
            "stage's blocks in the model that they come from, under their own names, and delete the other blocks"
        )
    return found


PIPELINE_TYPES = (PipelineSchedule, PipelineStageBase)
"""The classes of torch's pipelines: schedules and stages."""

_stage_models: WeakKeyDictionary[nn.Module, StageModel] = WeakKeyDictionary()


@contextmanager
def as_model(schedule: PipelineSchedule | PipelineStageBase) -> Iterator[PreTrainedModel]:
    """Yield the transformers model in a schedule's stage; while the context lasts, `stage_model_of` knows it.

    Args:
        schedule: A torch schedule with one stage on each rank.

    Raises:
        PlanError: It is no such schedule, its stage was traced, or there is no transformers model in the stage.
    """
    if not isinstance(schedule, PipelineScheduleSingle):
        what = "a stage alone" if isinstance(schedule, PipelineStageBase) else f"a {type(schedule).__name__}"
        raise PlanError(
            f"a capture of a torch pipeline takes its schedule, and found {what}: pass the schedule that runs the "
            "stage, ScheduleGPipe or Schedule1F1B, which says the number of microbatches"
        )
    stage = stage_of(schedule)
    if not isinstance(stage, PipelineStage):
        raise PlanError(
            "the stage was traced by torch.distributed.pipelining.pipeline(), and traced code has no sites: split "
            "the model yourself and put the blocks of each rank into a PipelineStage"
        )
    stage_model = StageModel(stage, n_microbatches_of(schedule))
    outer = _stage_models.get(stage_model.core)
    _stage_models[stage_model.core] = stage_model
    try:
        yield stage_model.core
    finally:
        if outer is None:
            del _stage_models[stage_model.core]
        else:
            _stage_models[stage_model.core] = outer


def stage_model_of(core: nn.Module) -> StageModel | None:
    """Return the stage that holds a model, while `as_model` lasts; None for any other model."""
    return _stage_models.get(core)


def runnable(model: nn.Module) -> nn.Module:
    """Return the module to call to run a model: its stage in a torch pipeline, or the model itself."""
    return _stage_models.get(model, model)
