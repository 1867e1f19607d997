"""Mixtures of experts that choose by themselves (Llama 4, JetMoE): routing and outputs against a plain computation."""

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import residua
from residua.capture.hooks.site import SiteInfo
from residua.capture.sites.names_to_modules import model_sites, resolve_sites
from residua.capture.taps.tap import tap
from residua.store.base.errors import UnknownSiteError
from tests.capture.manual_hooks import hooked
from tests.models.registries import build

IDS = torch.tensor([[5, 9, 30, 7, 12, 41], [6, 11, 4, 77, 50, 23]])
MLPS = {"llama4_text": "feed_forward", "jetmoe": "mlp"}
LAYER = 1
EVERY = pytest.mark.parametrize("key", MLPS)


@cache
def model_of(key: str) -> Any:
    """Return a model in float64 whose routers and experts give numbers that show, and whose biases are not zero."""
    model: Any = nn.Module.to(build("causal", key), torch.float64)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{MLPS[key]}." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model.eval()


@cache
def all_sites_of(key: str) -> dict[str, SiteInfo]:
    return model_sites(model_of(key))


def sites_of(key: str, kinds: str) -> dict[str, SiteInfo]:
    return {f"{kind}.{LAYER}": all_sites_of(key)[f"{kind}.{LAYER}"] for kind in kinds.split()}


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return logits


def taken_by(key: str, kinds: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return the rows of some kinds of sites, (tokens, row), and what the MLP took in a plain call."""
    model, sites = model_of(key), sites_of(key, kinds)
    kept: dict[str, Tensor] = {}
    entered: list[Tensor] = []
    mlp = model.get_submodule(f"model.layers.{LAYER}.{MLPS[key]}")
    with (
        hooked(mlp, lambda _m, args: entered.append(args[0].flatten(0, 1)), before=True),
        tap(model, sites, kept.__setitem__),
    ):
        logits_of(model)
    return {name.partition(".")[0]: rows.flatten(0, 1) for name, rows in kept.items()}, entered[0]


def expected(key: str, x: Tensor, index: Tensor | None = None) -> dict[str, Tensor]:
    """Compute the mixture token by token from the model's weights; with other experts if they are given."""
    mlp = model_of(key).get_submodule(f"model.layers.{LAYER}.{MLPS[key]}")
    router = mlp.router if key == "llama4_text" else mlp.router.layer
    silu = nn.functional.silu
    logits = x @ router.weight.T
    experts = logits.argsort(-1, descending=True)[:, :2] if index is None else index
    chosen = logits.gather(-1, experts)
    routed = torch.zeros_like(x)
    for token, row in enumerate(x):
        for place, expert in enumerate(experts[token]):
            if key == "llama4_text":
                gate, up = (row * chosen[token, place].sigmoid() @ mlp.experts.gate_up_proj[expert]).chunk(2)
                routed[token] += (silu(gate) * up) @ mlp.experts.down_proj[expert]
            else:
                gate, up = (mlp.input_linear.weight[expert] @ row).chunk(2)
                given = mlp.output_linear.weight[expert] @ (silu(gate) * up)
                routed[token] += chosen[token].softmax(-1)[place] * given
    found = {"router_logits": logits, "expert_index": experts, "routed_out": routed}
    if key == "llama4_text":
        shared = mlp.shared_expert
        found["shared_out"] = (silu(x @ shared.gate_proj.weight.T) * (x @ shared.up_proj.weight.T)) @ (
            shared.down_proj.weight.T
        )
        return found | {"mlp_out": routed + found["shared_out"]}
    return found | {"expert_weight": chosen.softmax(-1), "mlp_out": routed + mlp.bias}


OF_FLOAT32: Any = {"rtol": 1e-4, "atol": 1e-5}
"""Both routers compute their weights in float32."""


@EVERY
def test_routing_and_outputs_are_those_of_the_weights(key: str) -> None:
    own = "shared_out" if key == "llama4_text" else "expert_weight"
    kept, x = taken_by(key, f"router_logits expert_index routed_out mlp_out {own}")
    with torch.no_grad():
        wanted = expected(key, x)
    assert kept.keys() == wanted.keys()
    assert torch.equal(kept.pop("expert_index"), wanted["expert_index"])
    for kind, rows in kept.items():
        torch.testing.assert_close(rows.double(), wanted[kind], **OF_FLOAT32)
    assert len(set(wanted["expert_index"].flatten().tolist())) > 2
    assert len(x) == IDS.numel()


@EVERY
def test_other_experts_take_the_weights_of_their_own_logits(key: str) -> None:
    plain, x = taken_by(key, "expert_index")
    other = (plain["expert_index"] + 1) % 4
    seen: dict[str, Tensor] = {}
    sites = sites_of(key, "expert_index mlp_out")

    def change(name: str, tensor: Tensor) -> Tensor | None:
        seen[name] = tensor
        return other.view(tensor.shape) if name.startswith("expert_index") else None

    with tap(model_of(key), sites, change):
        logits_of(model_of(key))
    with torch.no_grad():
        wanted = expected(key, x, other)["mlp_out"]
    torch.testing.assert_close(seen[f"mlp_out.{LAYER}"].flatten(0, 1), wanted, **OF_FLOAT32)


@EVERY
def test_other_router_logits_choose_other_experts(key: str) -> None:
    model, other = model_of(key), deepcopy(model_of(key))
    order = torch.tensor([1, 2, 3, 0])
    router = other.get_submodule(sites_of(key, "router_logits")[f"router_logits.{LAYER}"].module)
    with torch.no_grad():
        router.weight.copy_(router.weight[order])
    wanted, plain = logits_of(other), logits_of(model)
    with tap(model, sites_of(key, "router_logits"), lambda _name, logits: logits[..., order]):
        torch.testing.assert_close(logits_of(model), wanted)
    assert not torch.allclose(plain, wanted, atol=1e-3)
    every = sites_of(key, "router_logits expert_index routed_out")
    with tap(model, every, lambda _name, tensor: tensor.clone()):
        assert torch.equal(logits_of(model), plain)


@EVERY
def test_a_routed_output_of_zeros_leaves_the_rest(key: str) -> None:
    model = model_of(key)
    seen: dict[str, Tensor] = {}
    own = "shared_out" if key == "llama4_text" else "routed_out"
    sites = sites_of(key, f"routed_out {own} mlp_out")

    def change(name: str, tensor: Tensor) -> Tensor | None:
        seen[name] = tensor
        return tensor * 0 if name.startswith("routed_out") else None

    with tap(model, sites, change):
        logits_of(model)
    mlp = model.get_submodule(f"model.layers.{LAYER}.{MLPS[key]}")
    rest = seen[f"shared_out.{LAYER}"] if key == "llama4_text" else mlp.bias.detach().expand(2, 6, -1)
    torch.testing.assert_close(seen[f"mlp_out.{LAYER}"], rest)


@EVERY
def test_routing_is_stored_and_replayed(key: str, tmp_path: Path) -> None:
    model = build("causal", key)
    examples = [{"input_ids": row.tolist()} for row in IDS]
    kinds = [f"{kind}.{LAYER}" for kind in ("router_logits", "expert_index", "routed_out")]
    archive = residua.capture_dataset(
        model, examples, out=tmp_path / "a.zarr", sites=",".join([*kinds, "logits"]), rows_per_shard=64
    ).archive
    index = torch.tensor(archive[f"expert_index.{LAYER}"][:])
    assert torch.equal(archive[f"router_logits.{LAYER}"].torch(slice(0, 12)).topk(2).indices, index)
    for site in kinds:
        with residua.replay(model, archive, examples=[0, 1], at=[site]) as back:
            torch.testing.assert_close(torch.stack(list(back.logits)), logits_of(model))


def test_weights_that_no_tensor_holds_are_refused_with_what_they_follow_from() -> None:
    with pytest.raises(UnknownSiteError, match=r"(?s)expert_weight\.1.*router_logits"):
        resolve_sites(model_of("llama4_text"), "expert_weight.1")
    with pytest.raises(UnknownSiteError, match=r"(?s)shared_out\.1.*model\.layers\.1"):
        resolve_sites(model_of("jetmoe"), "shared_out.1")
