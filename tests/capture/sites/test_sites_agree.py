"""Every canonical site of every architecture, against values that do not come from the hooks of the project."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from residua.capture.forward.inputs import forward_kwargs
from residua.capture.sites.architectures import KNOWN_MODEL_TYPES
from residua.capture.sites.names_to_modules import model_sites
from tests.capture.site_readings import LENGTHS, Reading, attention, batch, everything, read, run
from tests.models.tiny import LAYERS, ODD, TINY

PARALLEL = ("gpt_neox", "phi")
POST_NORM = ("bert", "opt-post-norm")
MIXTURES = ("mixtral", "qwen3_moe")
BOTH = [torch.float32, torch.bfloat16]
EVERY = pytest.mark.parametrize("name", TINY)
SOME_ODD = ["olmo2", "roberta"]


def block(model: PreTrainedModel, layer: int) -> nn.Module:
    return model.get_submodule(model_sites(model)[f"resid_post.{layer}"].module)


def test_every_known_model_type_is_tested() -> None:
    assert {make().config.model_type for make in TINY.values()} == set(KNOWN_MODEL_TYPES)


@pytest.mark.parametrize("name", [*TINY, *SOME_ODD])
def test_rows_have_the_announced_shape_and_dtype(name: str) -> None:
    got = everything(name)
    tokens = tuple(batch().input_ids.shape)
    sites = model_sites(got.model)
    assert list(got.sites) != []
    assert set(got.sites) == set(sites)
    for site, value in got.sites.items():
        expected = tuple(tokens[1] if size is None else size for size in sites[site].row_shape or ())
        assert value.shape == (*tokens, *expected), site
        assert str(value.dtype) == f"torch.{sites[site].dtype}"


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("name", [*TINY, *ODD])
def test_block_inputs_and_outputs_are_the_hidden_states(name: str, dtype: torch.dtype) -> None:
    got = everything(name, dtype)
    with attention(got.model, "eager"), torch.no_grad():
        kwargs = forward_kwargs(got.model, batch("left").input_ids, batch("left").attention_mask)
        output = got.model(**kwargs, output_hidden_states=True)
    states = output.hidden_states
    for layer in range(LAYERS):
        assert torch.equal(got[f"resid_pre.{layer}"], states[layer])
    for layer in range(LAYERS - 1):  # the last hidden state follows the final norm
        assert torch.equal(got[f"resid_post.{layer}"], states[layer + 1])
    assert torch.equal(got["final"], got[f"resid_post.{LAYERS - 1}"])
    assert torch.equal(got["logits"], output.logits)


@EVERY
def test_final_is_the_input_of_the_final_norm(name: str) -> None:
    got = everything(name)
    path = _FINAL_NORMS.get(name.split("-")[0], "model.norm")
    if name in POST_NORM:
        assert path not in dict(got.model.named_modules())
        return
    seen: list[Tensor] = []
    norm = got.model.get_submodule(path)
    handle = norm.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with attention(got.model, "eager"):
        run(got.model, batch("left"))
    handle.remove()
    assert torch.equal(seen[0], got["final"])


_FINAL_NORMS = {
    "bert": "bert.encoder.norm",
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "opt": "model.decoder.final_layer_norm",
    "phi": "model.final_layernorm",
}


@pytest.mark.parametrize("dtype", BOTH)
@EVERY
def test_the_stream_is_the_sum_of_attention_and_mlp_outputs(name: str, dtype: torch.dtype) -> None:
    got = everything(name, dtype)
    for layer in range(LAYERS):
        pre, post = got[f"resid_pre.{layer}"], got[f"resid_post.{layer}"]
        attention, mlp = got[f"attn_out.{layer}"], got[f"mlp_out.{layer}"]
        if name in PARALLEL:
            summed = mlp + attention + pre if name == "gpt_neox" else attention + mlp + pre
            assert torch.equal(post, summed)
            continue
        mid = got[f"resid_mid.{layer}"]
        after_attention, after_mlp = _norms_behind(name, block(got.model, layer))
        with torch.no_grad():
            assert torch.equal(mid, after_attention(pre + attention))
            assert torch.equal(post, after_mlp(mid + mlp))


def _norms_behind(name: str, module: nn.Module) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The norms between the sums and the stream: in BERT and the old OPT; identities elsewhere."""
    if name == "bert":
        return module.get_submodule("attention.output.LayerNorm"), module.get_submodule("output.LayerNorm")
    if name == "opt-post-norm":
        return module.get_submodule("self_attn_layer_norm"), module.get_submodule("final_layer_norm")
    return lambda summed: summed, lambda summed: summed


@EVERY
def test_the_mlp_output_is_the_down_projection_of_mlp_act(name: str) -> None:
    got = everything(name)
    layers = {"mixtral": (), "qwen3_moe": (1,)}.get(name, tuple(range(LAYERS)))
    assert tuple(n for n in range(LAYERS) if f"mlp_act.{n}" in got.sites) == layers
    for layer in layers:
        module = block(got.model, layer)
        with torch.no_grad():
            made = _down_projection(name, module)(got[f"mlp_act.{layer}"])
            if name.startswith("gemma"):
                made = module.get_submodule("post_feedforward_layernorm")(made)
        torch.testing.assert_close(made, got[f"mlp_out.{layer}"], atol=1e-6, rtol=1e-5)


def _down_projection(name: str, module: nn.Module) -> nn.Module:
    paths = {"gpt2": "mlp.c_proj", "phi": "mlp.fc2", "bert": "output.dense"}
    family = name.split("-")[0]
    paths |= {"opt": "fc2", "gpt_neox": "mlp.dense_4h_to_h"}
    return module.get_submodule(paths.get(family, "mlp.down_proj"))


@pytest.mark.parametrize("name", [*TINY, *SOME_ODD])
def test_patterns_are_the_attentions_of_eager(name: str) -> None:
    got = everything(name)
    with attention(got.model, "eager"), torch.no_grad():
        kwargs = forward_kwargs(got.model, batch("left").input_ids, batch("left").attention_mask)
        attentions = got.model(**kwargs, output_attentions=True).attentions
    for layer in range(LAYERS):
        assert torch.equal(got[f"pattern.{layer}"], attentions[layer].transpose(1, 2))


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("name", [*TINY, *SOME_ODD])
def test_queries_and_keys_give_the_pattern_and_with_values_the_heads(name: str, dtype: torch.dtype) -> None:
    """Recomputed in float64, with masks from their definition: within 3e-6, and 6e-2 in bfloat16."""
    bound = 3e-6 if dtype == torch.float32 else 6e-2
    got = everything(name, dtype)
    mask = batch("left").attention_mask.bool()
    assert got["pattern.1"][0, -1].amax(-1).mean() > 0.4, "uniform attention would prove little"
    for layer in range(LAYERS):
        expected = _pattern(got, layer, mask)
        pattern = got[f"pattern.{layer}"].double()
        assert (pattern - expected)[mask].abs().max() < bound
        value = got[f"v.{layer}"].double()
        value = value.repeat_interleave(pattern.shape[2] // value.shape[2], dim=2)
        heads = torch.einsum("bqhk,bkhd->bqhd", pattern, value)
        assert (got[f"z.{layer}"].double() - heads)[mask].abs().max() < bound * float(value.abs().max())


def _pattern(got: Reading, layer: int, mask_BT: Tensor) -> Tensor:
    """Attention weights from stored queries and keys, (batch, queries, heads, keys), in float64."""
    config = got.model.config
    query, key = got[f"q.{layer}"].double(), got[f"k.{layer}"].double()
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    scores = torch.einsum("bqhd,bkhd->bqhk", query, key) * _scale(config, query.shape[-1])
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap:
        scores = cap * torch.tanh(scores / cap)
    seen_QK = _seen(config, layer, query.shape[1])
    seen_BQK = seen_QK[None] & mask_BT[:, None, :]
    return scores.masked_fill(~seen_BQK[:, :, None, :], -torch.inf).softmax(-1)


def _scale(config: object, head_width: int) -> float:
    if getattr(config, "model_type", "") == "opt":  # OPT scales its queries earlier
        return 1.0
    scalar: float = getattr(config, "query_pre_attn_scalar", head_width)
    return 1 / math.sqrt(scalar)


def _seen(config: object, layer: int, n_positions: int) -> Tensor:
    """Which keys a query sees, (queries, keys): earlier keys, and in a window only the nearest."""
    distance = torch.arange(n_positions)[:, None] - torch.arange(n_positions)[None]
    if getattr(config, "model_type", "") in ("bert", "roberta"):
        return torch.ones_like(distance, dtype=torch.bool)
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    is_local = types[layer] == "sliding_attention" if types else window is not None
    return (distance >= 0) & (distance < window) if is_local and window else distance >= 0


def test_windows_are_short_enough_to_matter() -> None:
    got = everything("mistral")
    longest = max(LENGTHS)
    assert got.model.config.sliding_window < longest
    assert (got["pattern.0"][0, longest - 1, :, 0] == 0).all()


@pytest.mark.parametrize("name", [*TINY, *ODD])
def test_reading_changes_no_bit_of_the_logits(name: str) -> None:
    model = {**TINY, **ODD}[name]()
    before = run(model)
    got = read(model, [site for site in model_sites(model) if "pattern" not in site])
    assert torch.equal(got.logits, before)
    assert torch.equal(got["logits"], before)
    with attention(model, "eager"):
        before = run(model)
        assert torch.equal(read(model, model_sites(model)).logits, before)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "bert"])
def test_queries_and_keys_are_the_same_under_sdpa(name: str) -> None:
    model = TINY[name]()
    assert model.config._attn_implementation == "sdpa"
    got = read(model, ["q.0", "k.0", "v.0", "z.0"], batch("left"))
    for site in ("q.0", "k.0", "v.0"):
        assert torch.equal(got[site], everything(name)[site])
    mask = batch("left").attention_mask.bool()
    torch.testing.assert_close(got["z.0"][mask], everything(name)["z.0"][mask], atol=1e-5, rtol=1e-5)
