"""Gradients across the stages of transformers' own pipelines: where they begin and end."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from residua.capture.tap import tap
from tests.distributed.checks import relative_error
from tests.distributed.expected import batch, inner_weight, loss_of
from tests.distributed.refusals import Load
from tests.models import SPLIT

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


CHECKS = (gradients_through_a_pipeline,)
