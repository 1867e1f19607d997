"""Gradients of named metrics equal those of autograd through hooks on the full model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

import residua
from residua.capture.forward.inputs import forward_kwargs
from residua.capture.forward.plan_batch import plan_batch
from residua.capture.sites.anatomy import anatomy_of
from residua.store.base.errors import PlanError
from tests.capture.manual_hooks import hooked
from tests.capture.replay_samples import PADDED, captured, model_of, tokens

KEPT = "resid_post.1"
METRICS: dict[str, Any] = {"loss": "loss", "difference": {"logit_difference": [7, 11], "position": -2}, "kl": "kl"}
Nodes = dict[str, Tensor]


def by_hand(model: nn.Module, archive: residua.Archive) -> tuple[Nodes, list[Tensor]]:
    """Run the full model; its graph starts at the first block, and the second block's output is doubled."""
    batch = plan_batch(archive.example_table, PADDED, side="right", device=torch.device("cpu")).padded
    anatomy = anatomy_of(model)
    assert anatomy is not None
    nodes: Nodes = {}

    def begin(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        nodes["resid_post.0"] = output.detach().requires_grad_()
        return nodes["resid_post.0"]

    def double(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        nodes[KEPT] = output * 2
        return nodes[KEPT]

    blocks = [anatomy.modules[path] for path in anatomy.blocks]
    with hooked(blocks[0], begin), hooked(blocks[1], double):
        logits = model(**forward_kwargs(model, batch.input_ids, batch.attention_mask)).logits
    lengths = [len(tokens()[example]) for example in PADDED]
    return nodes, [logits[place, :length] for place, length in enumerate(lengths)]


def loss_by_hand(logits: list[Tensor], _original: list[Tensor]) -> Tensor:
    found = [
        F.cross_entropy(values[:-1], torch.tensor(tokens()[example][1:]), reduction="sum")
        for values, example in zip(logits, PADDED, strict=True)
    ]
    return torch.stack(found).sum() / sum(len(values) - 1 for values in logits)


def difference_by_hand(logits: list[Tensor], _original: list[Tensor]) -> Tensor:
    return torch.stack([values[-2, 7] - values[-2, 11] for values in logits]).mean()


def kl_by_hand(logits: list[Tensor], original: list[Tensor]) -> Tensor:
    pairs = zip(logits, original, strict=True)
    both = [F.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="none").sum(-1) for q, p in pairs]
    return torch.cat(both).mean()


BY_HAND: dict[str, Callable[[list[Tensor], list[Tensor]], Tensor]] = {
    "loss": loss_by_hand,
    "difference": difference_by_hand,
    "kl": kl_by_hand,
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "mixtral", "bert"])
def test_gradients_are_those_of_hooks_by_hand(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    archive = captured(model, tmp_path / "a", sites="resid_post.0")
    doubling = {"edit": "scale", "site": KEPT, "by": 2}
    with residua.replay(model, archive, examples=PADDED, at="resid_post.0") as plain:
        original = plain.logits
    given: dict[str, Any] = {"examples": PADDED, "at": "resid_post.0", "keep": KEPT, "edits": [doubling], "grad": True}
    with residua.replay(model, archive, **given) as run:
        for metric, spec in METRICS.items():
            if metric == "loss" and name == "bert":  # which predicts no next token
                continue
            nodes, logits = by_hand(model, archive)
            value = BY_HAND[metric](logits, original)
            wanted = dict(zip(nodes, torch.autograd.grad(value, list(nodes.values())), strict=True))
            torch.testing.assert_close(run.metric(spec), value)
            found = run.gradients(spec)
            assert found.keys() == {"resid_post.0", KEPT}
            for site, gradients in found.items():
                largest = wanted[site].abs().max()
                for place, gradient in enumerate(gradients):
                    difference = (gradient - wanted[site][place, : len(gradient)]).abs().max()
                    assert difference <= 2e-5 * largest, (metric, site)
    assert all(parameter.grad is None for parameter in model.parameters())


def adding(what: Tensor) -> Callable[[str, Tensor], Tensor]:
    return lambda _site, rows: rows + what


def test_gradients_of_a_run_without_stored_rows_begin_at_the_embeddings(tmp_path: Path) -> None:
    model = model_of("gpt2")
    archive = captured(model, tmp_path / "a", sites="embed,z.1")
    with residua.replay(model, archive, examples=PADDED, keep="z.1,resid_mid.1,pattern.1", grad=True) as run:
        found = run.gradients("loss")
    assert {site: rows[0].shape for site, rows in found.items()} == {
        "embed": (11, 32),
        "z.1": (11, 4, 8),
        "resid_mid.1": (11, 32),
        "pattern.1": (11, 4, 11),
    }
    step = 1e-3
    for site in ("z.1", "resid_mid.1"):
        direction = found[site][0] / found[site][0].norm()
        losses = []
        for sign in (step, -step):
            moved = {
                "edit": "function",
                "site": site,
                "examples": [3],
                "function": adding(sign * direction),
            }
            with residua.replay(model, archive, examples=PADDED, edits=[moved]) as run:
                losses.append(run.metric("loss").double())
        torch.testing.assert_close(
            found[site][0].norm().double(), (losses[0] - losses[1]) / (2 * step), rtol=0.02, atol=0
        )


def test_unknown_metrics_are_refused(tmp_path: Path) -> None:
    model = model_of("llama")
    archive = captured(model, tmp_path / "a", sites="resid_post.0")
    with residua.replay(model, archive, examples=PADDED, at="resid_post.0") as run:
        with pytest.raises(PlanError, match="grad=True"):
            run.gradients("loss")
        for metric in ("los", {"logit_difference": [1]}, {"logit_difference": [1, 2], "at": 3}):
            with pytest.raises(PlanError, match=r"metric|logit difference"):
                run.metric(metric)
        with pytest.raises(PlanError, match=r"\b7 tokens.*\b97"):
            run.metric({"logit_difference": [1, 2], "position": 8})
        assert run.metric("kl") == 0
        torch.testing.assert_close(run.metric(lambda outcome: outcome.logits[1].sum()), run.logits[1].sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_widened_before_they_are_subtracted(dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of("gpt2", dtype)
    archive = captured(model, tmp_path / "a", sites="resid_post.0")
    with residua.replay(model, archive, examples=PADDED) as run:
        found = [run.metric({"logit_difference": [first, 11], "position": -2}) for first in range(12, 40)]
        logits = [rows.double() for rows in run.logits]
    for first, value in zip(range(12, 40), found, strict=True):
        expected = torch.stack([rows[-2, first] - rows[-2, 11] for rows in logits]).mean()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
