"""An LM head smaller than the vocabulary: tokens without a logit have no loss and are counted; answers need one."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import residua
from residua.store.base.errors import PlanError

N_LOGITS, N_TOKENS = 40, 64


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=N_TOKENS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
    )
    made.lm_head = nn.Linear(32, N_LOGITS, bias=False)
    nn.Module.train(made, False)
    return made


@pytest.fixture(scope="module")
def tokens() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, N_TOKENS, 20).tolist() for _ in range(12)]


@pytest.fixture(scope="module")
def archive(
    model: PreTrainedModel, tokens: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> residua.Archive:
    out = tmp_path_factory.mktemp("small") / "a.zarr"
    return residua.capture_dataset(model, tokens, out=out, sites="resid_post.*").archive


def expected(model: PreTrainedModel, ids: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().numpy()
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return [-logs[i, token] if token < N_LOGITS else math.nan for i, token in enumerate(ids[1:])]


def test_losses_are_those_of_tokens_with_a_logit(
    model: PreTrainedModel, tokens: list[list[int]], archive: residua.Archive
) -> None:
    with residua.replay(model, archive, examples=[0, 1], at="resid_post.0", grad=True) as run:
        wanted = [expected(model, ids) for ids in tokens[:2]]
        for losses, example in zip(run.losses, wanted, strict=True):
            np.testing.assert_allclose(losses.detach().numpy(), example, rtol=1e-4)
        np.testing.assert_allclose(float(run.metric("loss").detach()), np.nanmean(np.concatenate(wanted)), rtol=1e-4)
        assert run.gradients("loss")["resid_post.0"][0].isfinite().all()
        n_lost = sum(token >= N_LOGITS for ids in tokens[:2] for token in ids[1:])
        assert any(f"{n_lost} next tokens" in note and str(N_LOGITS) in note for note in run.notes)


def test_tables_leave_them_out(
    model: PreTrainedModel, tokens: list[list[int]], archive: residua.Archive, tmp_path: Path
) -> None:
    half = [{"edit": "scale", "site": "resid_post.1", "by": 0.5}]
    found = residua.replay_dataset(model, archive, out=tmp_path / "out", at="resid_post.0", edits=half)
    column = found.tokens["unedited_loss"].to_pylist()
    wanted = [value for ids in tokens for value in (*expected(model, ids), math.nan)]
    assert [value is None for value in column] == [math.isnan(value) for value in wanted]
    np.testing.assert_allclose([v for v in column if v is not None], [v for v in wanted if v == v], rtol=1e-4)
    assert all(math.isfinite(value) for value in found.examples["loss_change"].to_pylist())
    assert any("have no loss" in note for note in found.notes)


@pytest.mark.parametrize("field", ["answer", "wrong"])
def test_an_answer_without_a_logit_is_refused(field: str, model: PreTrainedModel, tokens: list[list[int]]) -> None:
    clean = tokens[0]
    pair = {"clean": clean, "corrupted": [*clean[:-1], 5], "answer": 7, "wrong": 6, field: N_LOGITS}
    ran: list[int] = []
    handle = model.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(PlanError, match=rf"{N_LOGITS}\b.*logit"):
        residua.patch(model, [pair], sites="resid_post.1", positions=[-1])
    handle.remove()
    assert not ran


def test_a_lens_is_trained_and_evaluated(archive: residua.Archive, tmp_path: Path) -> None:
    lens = residua.TunedLens.fit(archive, out=tmp_path / "lens")
    assert lens.report is not None
    for name in lens.report.column_names:
        assert all(value is None or value == value for value in lens.report[name].to_pylist()), name
