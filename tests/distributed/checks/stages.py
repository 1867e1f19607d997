"""Across the stages of pipelines: where gradients begin and end, and the names of weights."""

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from transformers import LlamaForCausalLM

from residua.capture.identity.fingerprint import weights_fingerprint
from residua.capture.runtime.pipeline_schedule import as_model
from residua.capture.taps.tap import tap
from residua.store.base.errors import CaptureError
from tests.distributed.checks.refusals import Load
from tests.distributed.layouts.case import relative_error
from tests.distributed.layouts.single_process import batch, inner_weight, loss_of
from tests.distributed.layouts.torch_pipeline import Part
from tests.models.tiny import SPLIT, TINY

EMBEDDING = "model.embed_tokens"


def gradients_through_a_pipeline(load: Load) -> None:
    """They get from the last stage to the first inside a tap that asks for them, and nothing is left of it."""
    model: Any = load("llama", pp_size=2)
    is_first = dist.get_rank() == 0
    inputs, bare = batch(0), SPLIT["llama"]()
    loss_of(bare, inputs).backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
    before = model(**inputs).logits
    assert before.requires_grad != is_first, "transformers hands on gradients itself: leave it to it"
    kept: dict[str, Tensor] = {}
    with tap(model, "resid_post.*", kept.__setitem__, backward=True):
        loss_of(model, inputs).backward()  # type: ignore[no-untyped-call]  # as above
    assert sorted(kept) == (["resid_post.0"] if is_first else ["resid_post.1", "resid_post.2"])
    if is_first:
        wanted = bare.get_parameter(f"{EMBEDDING}.weight").grad
        assert wanted is not None
        assert relative_error(model.get_parameter(f"{EMBEDDING}.weight").grad, wanted) < 1e-5
    frozen_with_a_weight_inside(model, inputs, is_first=is_first)
    assert not {"communicate", "broadcast_from_last"} & vars(model._pp_stage).keys()
    model.requires_grad_(True)
    after = model(**inputs).logits
    assert torch.equal(before, after)
    assert after.requires_grad != is_first


def frozen_with_a_weight_inside(model: Any, inputs: dict[str, Any], *, is_first: bool) -> None:
    """Taps inside each other, and a model that needs no gradients itself."""
    model.requires_grad_(False)
    weight, inside = inner_weight(32)
    with (
        tap(model, "resid_post.0", inside, differentiable=True),
        tap(model, "final", lambda _site, tensor: tensor * 2, differentiable=True),
    ):
        with torch.no_grad():
            quiet = model(**inputs).logits
        loss = loss_of(model, inputs)
    loss.backward()  # type: ignore[no-untyped-call]  # as above
    assert torch.equal(quiet.float().square().mean(), loss)
    bare = SPLIT["llama"]().requires_grad_(False)
    alone, inside_alone = inner_weight(32)
    with (
        tap(bare, "resid_post.0", inside_alone, differentiable=True),
        tap(bare, "final", lambda _site, tensor: tensor * 2, differentiable=True),
    ):
        loss_of(bare, inputs).backward()  # type: ignore[no-untyped-call]  # as above
    assert alone.grad is not None
    assert (weight.grad is not None) == is_first
    if weight.grad is not None:
        assert relative_error(weight.grad, alone.grad) < 1e-5


def names_in_stages(_load: Load) -> None:
    """Tied weights count once, as in one process; blocks that are numbered anew on each stage are refused."""
    torch.manual_seed(0)  # or each rank would have weights of its own
    config: Any = TINY["llama"]().config
    config.tie_word_embeddings = True
    tied = LlamaForCausalLM(config)
    wanted = weights_fingerprint(tied)
    with as_model(scheduled(Part(deepcopy(tied), dist.get_rank(), 2))) as model:
        assert weights_fingerprint(model) == wanted
    part: Any = Part(tied, dist.get_rank(), 2)
    part.llm.base_model.layers = nn.ModuleList(part.llm.base_model.layers.values())
    words = r"different weights under the name 'model\.layers\.0\..*the names that they have in the full model"
    with as_model(scheduled(part)) as model, pytest.raises(CaptureError, match=words):
        weights_fingerprint(model)


def scheduled(module: nn.Module) -> ScheduleGPipe:
    return ScheduleGPipe(PipelineStage(module, dist.get_rank(), 2, torch.device("cpu")), 2)


CHECKS = (gradients_through_a_pipeline, names_in_stages)
