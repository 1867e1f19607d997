"""Captures of torch's pipelines on one rank, which has the only stage: what is accepted, and what is refused.

Pipelines of several ranks are in `tests.distributed.model_parallel.test_capture`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, ScheduleInterleaved1F1B
from transformers import PreTrainedModel

from residua.capture.recording.recorder import Recorder
from residua.pipelines.capture.capture import capture_dataset
from residua.store.base.errors import CaptureError, PlanError
from residua.store.read.archive import Archive
from tests.distributed.layouts.torch_pipeline import Part
from tests.models.tiny import TINY

TOKENS = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14] * 9, [15]]
OPTIONS: dict[str, Any] = {"sites": "resid_post.*,q.1,final,logits", "rows_per_shard": 8, "batch_tokens": 16}


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def stage(module: nn.Module, n_stages: int = 1, index: int = 0) -> PipelineStage:
    return PipelineStage(module, index, n_stages, torch.device("cpu"))


def assert_same(got: Archive, wanted: Archive) -> None:
    assert got.plan == wanted.plan
    for site in wanted.sites:
        assert np.allclose(got[site].numpy(), wanted[site].numpy(), rtol=0, atol=1e-4), site


def test_the_only_stage_of_a_pipeline_gives_the_archive_of_its_model(tmp_path: Path) -> None:
    schedule = ScheduleGPipe(stage(Part(TINY["llama"](), 0, 1)), 2)
    got = capture_dataset(schedule, TOKENS, out=tmp_path / "stages", **OPTIONS).archive
    assert_same(got, capture_dataset(TINY["llama"](), TOKENS, out=tmp_path / "plain", **OPTIONS).archive)
    ids = torch.arange(3, 23).view(4, 5)
    with torch.no_grad():
        logits = schedule.step(ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(5).expand(4, 5))
        wanted = TINY["llama"]()(ids).logits
    assert isinstance(logits, Tensor)
    assert torch.allclose(logits, wanted, atol=1e-4), "the schedule works for the user as before"


class WithoutMask(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.llm = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.llm(input_ids=tokens, use_cache=False).logits
        return logits


def test_padding_is_refused_where_a_stage_takes_no_mask(tmp_path: Path) -> None:
    schedule = ScheduleGPipe(stage(WithoutMask(TINY["llama"]())), 2)
    with pytest.raises(CaptureError, match=r"WithoutMask.* takes no attention_mask"):
        capture_dataset(schedule, TOKENS, out=tmp_path / "padded", **OPTIONS)
    alone = {**OPTIONS, "batch_tokens": 1}
    got = capture_dataset(schedule, TOKENS, out=tmp_path / "alone", **alone).archive
    assert_same(got, capture_dataset(TINY["llama"](), TOKENS, out=tmp_path / "plain", **alone).archive)


def test_a_recorder_refuses_a_schedule(tmp_path: Path) -> None:
    schedule: Any = ScheduleGPipe(stage(Part(TINY["llama"](), 0, 1)), 2)
    with pytest.raises(CaptureError, match=r"ScheduleGPipe.* schedule and dataset to residua\.capture_dataset"):
        Recorder(schedule, sites="resid_post.1", out=tmp_path / "out")


def interleaved() -> ScheduleInterleaved1F1B:
    stages: list[Any] = [stage(nn.Linear(2, 2), 2, index) for index in (0, 1)]
    return ScheduleInterleaved1F1B(stages, 2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: stage(Part(TINY["llama"](), 0, 1)),
            "a stage alone: pass the schedule",
        ),
        (interleaved, "a ScheduleInterleaved1F1B: pass the schedule .* ScheduleGPipe or Schedule1F1B"),
        (lambda: ScheduleGPipe(stage(nn.Linear(2, 2), 2), 2), "2 stages on 1 ranks.* as one stage"),
        (lambda: ScheduleGPipe(stage(nn.Linear(2, 2)), 2), "runs a Linear without a transformers model in it"),
    ],
)
def test_anything_but_a_schedule_with_one_stage_on_each_rank_is_refused(make: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=words):
        capture_dataset(make(), TOKENS, out=tmp_path / "out", **OPTIONS)
