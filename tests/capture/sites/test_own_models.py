"""Models that a user wrote, which no table and no registry knows: their sites are found and proved like any other's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import residua
from residua.store.base.errors import PlanError

WIDTH, HEADS, VOCABULARY = 16, 4, 31
IDS = [[5, 9, 2, 7], [3, 30], [8, 11, 4, 2, 6]]


class OwnConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]  # transformers has no annotations here
    model_type = "own_of_a_user"


class OwnBlock(nn.Module):
    """A block with attention in its own code: by a softmax, or by torch's fused call."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))

    def forward(self, hidden_BTD: Tensor, mask: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](hidden_BTD)).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2)
        q, k, v = heads.chunk(3, dim=1)
        if self.fused:
            z = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = q @ k.transpose(-1, -2) / 2 + torch.where(mask, 0.0, -1e9)
            z = scores.softmax(-1) @ v
        hidden_BTD = hidden_BTD + self.out(z.transpose(1, 2).flatten(2))
        added_BTD: Tensor = self.mlp(self.norms[1](hidden_BTD))
        return hidden_BTD + added_BTD


class Own(nn.Module):
    """A plain torch module over token ids."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(OwnBlock(fused=fused) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        n = input_ids.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None].bool() | torch.eye(n, dtype=torch.bool)
        hidden_BTD = self.embed(input_ids)
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD, mask)
        logits_BTV: Tensor = self.head(hidden_BTD)
        return logits_BTV


class OwnLM(PreTrainedModel):  # type: ignore[no-untyped-call]  # transformers has no annotations here
    """The same as a model of transformers."""

    config_class = OwnConfig

    def __init__(self, config: OwnConfig, *, fused: bool = False) -> None:
        super().__init__(config)
        self.inner = Own(fused=fused)
        self.post_init()  # type: ignore[no-untyped-call]  # transformers has no annotations here

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return CausalLMOutput(logits=self.inner(input_ids, attention_mask))


def lm(*, fused: bool) -> OwnLM:
    torch.manual_seed(3)
    settings: dict[str, Any] = {"num_hidden_layers": 3, "hidden_size": WIDTH, "vocab_size": VOCABULARY}
    model = OwnLM(OwnConfig(**settings), fused=fused)
    model.train(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def given(model: nn.Module, path: str, ids: list[int]) -> Tensor:
    """Return what a module of a model gives for one example alone, by a plain hook."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _m, _a, out: seen.append(out.clone()))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0][0]


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_of_a_users_own_class_has_the_sites_of_any_other(fused: bool, tmp_path: Path) -> None:
    model = lm(fused=fused)
    sites = "resid_post.*,attn_out.1,mlp_out.1,mlp_act.1,z.1"
    archive = residua.capture_dataset(model, IDS, out=tmp_path / "a.zarr", sites=sites).archive
    modules = {"resid_post.2": "blocks.2", "attn_out.1": "blocks.1.out", "mlp_out.1": "blocks.1.mlp"}
    for site, path in {**modules, "mlp_act.1": "blocks.1.mlp.1"}.items():
        expected = torch.cat([given(model, f"inner.{path}", ids) for ids in IDS])
        torch.testing.assert_close(torch.as_tensor(archive[site][:]), expected, atol=1e-5, rtol=1e-5)
    with residua.replay(model, archive, examples=[2], at="resid_post.1") as run:
        expected = given(model, "inner.head", IDS[2])
        torch.testing.assert_close(run.logits[0], expected, atol=1e-5, rtol=1e-5)


def test_a_module_that_is_no_model_of_transformers_is_recorded(tmp_path: Path) -> None:
    model = lm(fused=False).inner
    site = "module:blocks.1@output"
    with torch.no_grad(), residua.Recorder(model, out=tmp_path / "a.zarr", sites=site):
        model(input_ids=torch.tensor(IDS[:1] * 2))
    stored = torch.as_tensor(residua.open(tmp_path / "a.zarr")[site][:]).reshape(2, len(IDS[0]), WIDTH)
    torch.testing.assert_close(stored[1], given(model, "blocks.1", IDS[0]))


@pytest.mark.parametrize("make", [lambda: lm(fused=False).inner, lambda: nn.Linear(2, 2)])
def test_jobs_over_tokens_refuse_it_and_say_what_does_work(make: Any, tmp_path: Path) -> None:
    model = make()
    words = rf"{type(model).__name__}.*Recorder"
    with pytest.raises(PlanError, match=words):
        residua.capture_dataset(model, IDS, out=tmp_path / "a.zarr", sites="module:blocks.1@output")
    with pytest.raises(PlanError, match=words):
        residua.run(model, IDS)
