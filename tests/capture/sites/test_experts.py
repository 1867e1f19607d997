"""Mixtures of experts: the routing and what the experts give, against transformers' own logits and by recomputation."""

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import residua
from residua.capture.hooks.site import SiteInfo
from residua.capture.sites.names_to_modules import model_sites, resolve_sites
from residua.capture.taps.tap import tap
from residua.store.base.errors import CaptureError, PlanError, UnknownSiteError
from tests.capture.manual_hooks import hooked
from tests.mixer_models import EXPERTS
from tests.models.tiny import TINY

IDS = torch.tensor([[5, 9, 30, 7, 12, 41, 8, 3], [6, 11, 4, 77, 50, 23, 9, 10]])
LAYER = 1
ROUTING = ("router_logits", "expert_index", "expert_weight")


@cache
def model_of(name: str) -> PreTrainedModel:
    return EXPERTS[name]()


@cache
def sites_of(name: str) -> dict[str, SiteInfo]:
    return model_sites(model_of(name))


def run(model: PreTrainedModel, **options: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options)


def tapped(name: str, *kinds: str) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    with tap(
        model_of(name), {f"{kind}.{LAYER}": sites_of(name)[f"{kind}.{LAYER}"] for kind in kinds}, kept.__setitem__
    ):
        run(model_of(name))
    return {site.partition(".")[0]: value for site, value in kept.items()}


def experts_of(name: str) -> nn.Module:
    return model_of(name).get_submodule(sites_of(name)[f"expert_index.{LAYER}"].module)


@pytest.mark.parametrize("name", EXPERTS)
def test_router_logits_are_those_of_transformers(name: str) -> None:
    found = run(model_of(name), output_router_logits=True).router_logits
    kept = tapped(name, *ROUTING)
    assert torch.equal(kept["router_logits"].flatten(0, 1), found[-1])
    assert kept["expert_index"].dtype == torch.int64
    assert kept["expert_index"].shape == kept["expert_weight"].shape == (2, 8, 2)


@pytest.mark.parametrize("name", [name for name in EXPERTS if name != "deepseek_v3"])
def test_the_chosen_experts_have_the_largest_logits(name: str) -> None:
    kept = tapped(name, *ROUTING)
    assert torch.equal(kept["expert_index"], kept["router_logits"].topk(2).indices)
    assert len(set(kept["expert_index"].flatten().tolist())) > 2
    weights = kept["router_logits"].double().softmax(-1).gather(-1, kept["expert_index"])
    if name not in ("jamba", "olmoe", "qwen2_moe", "qwen3_moe"):  # these do not let the weights add up to 1
        weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(kept["expert_weight"].double(), weights, rtol=1e-5, atol=1e-6)


def test_experts_are_chosen_by_group_and_bias() -> None:
    kept = tapped("deepseek_v3", *ROUTING)
    gate = model_of("deepseek_v3").get_submodule("model.layers.1.mlp.gate")
    scores = kept["router_logits"].double().sigmoid()
    biased = scores + gate.get_buffer("e_score_correction_bias")
    groups = biased.view(*biased.shape[:2], 2, 4).topk(2).values.sum(-1)
    allowed = torch.zeros_like(groups).scatter(-1, groups.argmax(-1, keepdim=True), 1).repeat_interleave(4, -1)
    expected = biased.masked_fill(allowed == 0, -1.0).topk(2).indices.sort().values
    assert torch.equal(kept["expert_index"].sort().values, expected)
    chosen = scores.gather(-1, kept["expert_index"])
    torch.testing.assert_close(
        kept["expert_weight"].double(), 2.5 * chosen / chosen.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", [name for name in EXPERTS if name != "gpt_oss"])
def test_the_routed_output_follows_from_indices_weights_and_experts(name: str) -> None:
    experts, factor = experts_of(name), sites_of(name)[f"routed_out.{LAYER}"].factor
    path = sites_of(name)[f"expert_index.{LAYER}"].module
    kept = tapped(name, *ROUTING, "routed_out")
    taken: dict[str, Tensor] = {}
    with tap(model_of(name), f"module:{path}@input", taken.__setitem__):
        run(model_of(name))
    (x,) = (tensor.reshape(2, 8, -1).double() for tensor in taken.values())
    up, down = (experts.get_parameter(each).double() for each in ("gate_up_proj", "down_proj"))
    expected = torch.zeros_like(x)
    for choice in range(2):
        index = kept["expert_index"][..., choice]
        gate, value = torch.einsum("btd,btfd->btf", x, up[index]).chunk(2, -1)
        given = torch.einsum("btf,btdf->btd", nn.functional.silu(gate) * value, down[index])
        expected += kept["expert_weight"][..., choice, None].double() * given
    assert factor == (0.22 if name == "granitemoehybrid" else 1.0)
    torch.testing.assert_close(kept["routed_out"].double(), factor * expected, rtol=1e-4, atol=1e-4)


def test_routed_and_shared_experts_add_up() -> None:
    kept = tapped("deepseek_v3", "routed_out", "shared_out", "mlp_out")
    torch.testing.assert_close(kept["routed_out"] + kept["shared_out"], kept["mlp_out"])
    kept = tapped("granitemoehybrid", "resid_mid", "routed_out", "shared_out", "resid_post")
    torch.testing.assert_close(kept["resid_mid"] + kept["routed_out"] + kept["shared_out"], kept["resid_post"])
    kept = tapped("mixtral", "routed_out", "mlp_out")
    assert torch.equal(kept["routed_out"], kept["mlp_out"])


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_next"])
def test_a_shared_expert_behind_a_gate_is_what_is_added(name: str) -> None:
    model, mlp = model_of(name), f"model.layers.{LAYER}.mlp"
    parts = [f"module:{mlp}@input", f"module:{mlp}.shared_expert@output", f"module:{mlp}.shared_expert_gate@output"]
    taken: dict[str, Tensor] = {}
    with tap(model, parts, taken.__setitem__):
        run(model)
    kept = tapped(name, "routed_out", "shared_out", "mlp_out")
    product = taken[parts[1]] * taken[parts[2]].sigmoid()
    assert torch.equal(kept["shared_out"].flatten(), product.flatten())
    torch.testing.assert_close(kept["routed_out"] + kept["shared_out"], kept["mlp_out"])
    one_token = torch.tensor([[5]])  # goes to fewer experts than the tokens with which the site was found
    for ids in (IDS, one_token):
        with torch.no_grad():
            with tap(model, {f"shared_out.{LAYER}": sites_of(name)[f"shared_out.{LAYER}"]}, lambda _n, t: t * 0):
                got = model(input_ids=ids).logits
            with hooked(model.get_submodule(f"{mlp}.shared_expert"), lambda _m, _a, out: out * 0):
                assert torch.equal(model(input_ids=ids).logits, got)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_other_router_logits_choose_other_experts(name: str) -> None:
    model, info = model_of(name), sites_of(name)[f"router_logits.{LAYER}"]
    order = torch.arange(info.row_shape[-1] or 0).roll(1)  # type: ignore[index]  # it is measured
    if name == "deepseek_v3":
        order = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    other = deepcopy(model)
    router = other.get_submodule(info.module)
    with torch.no_grad():
        for each in [*router.parameters(), *router.buffers()]:
            if name != "deepseek_v3" or each.ndim > 1:
                each.copy_(each[order])
    plain, expected = run(model).logits, run(other).logits
    with tap(model, {info.name: info}, lambda _n, logits: logits[..., order]):
        torch.testing.assert_close(run(model).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-3)
    with tap(model, {info.name: info}, lambda _n, logits: logits.clone()):
        assert torch.equal(run(model).logits, plain)


def test_routing_is_stored_and_replayed(tmp_path: Path) -> None:
    model = TINY["mixtral"]()
    kinds = [f"{kind}.{LAYER}" for kind in ROUTING]
    archive = residua.capture_dataset(
        model,
        [{"input_ids": row.tolist()} for row in IDS],
        out=tmp_path / "a.zarr",
        sites=",".join([*kinds, "logits"]),
        rows_per_shard=64,
    ).archive
    plain = run(model)
    index = torch.tensor(archive[f"expert_index.{LAYER}"][:])
    assert index.dtype == torch.int64
    logits = archive[f"router_logits.{LAYER}"].torch(slice(0, 16))
    assert torch.equal(logits.topk(2).indices, index)
    for at in ([f"router_logits.{LAYER}"], [f"expert_index.{LAYER}", f"expert_weight.{LAYER}"]):
        with residua.replay(model, archive, examples=[0, 1], at=at) as back:
            assert torch.equal(torch.stack(list(back.logits)), plain.logits)
    off = [{"edit": "add", "site": f"router_logits.{LAYER}", "vector": [-1e4, 0.0, 0.0, 0.0]}]
    with residua.replay(model, archive, examples=[0, 1], edits=off) as edited:
        chosen = torch.stack(list(edited[f"expert_index.{LAYER}"]))
        assert not torch.equal(torch.stack(list(edited.logits)), plain.logits)
    assert 0 in index
    assert 0 not in chosen
    zero = [{"edit": "zero", "site": f"expert_index.{LAYER}"}]
    with (
        pytest.raises(PlanError, match="int64"),
        residua.replay(model, archive, examples=[0, 1], edits=zero) as refused,
    ):
        _ = refused.logits


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_inside_experts_no_row_is_a_token(name: str, tmp_path: Path) -> None:
    path = sites_of(name)[f"expert_index.{LAYER}"].module
    rows = [{"input_ids": IDS[0].tolist()}]
    with pytest.raises(CaptureError, match="expert_index"):
        residua.capture_dataset(model_of(name), rows, out=tmp_path / "a.zarr", sites=f"module:{path}.act_fn")
    with pytest.raises(UnknownSiteError, match="expert_index"):
        resolve_sites(model_of(name), f"module:{path}.3")
    (info,) = resolve_sites(model_of(name), f"module:{path}").values()
    assert info.per_token


def test_blocks_without_experts_say_so() -> None:
    assert "expert_index.0" not in sites_of("deepseek_v3")
    with pytest.raises(UnknownSiteError, match=r"expert_index\.0.*model\.layers\.0"):
        resolve_sites(model_of("deepseek_v3"), "expert_index.0")
    with pytest.raises(UnknownSiteError, match="no mixture of experts"):
        resolve_sites(TINY["llama"](), "router_logits.0")
