"""Differential attention: values and head outputs of twice the width, read and changed, against a plain computation."""

from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from residua.capture.sites.names_to_modules import resolve_sites
from residua.capture.taps.tap import tap
from residua.store.base.errors import UnknownSiteError
from tests.capture.manual_hooks import hooked
from tests.models.registries import build


def diffllama(n_heads: int, n_kv: int, implementation: str) -> Any:
    """Return a small DiffLlama in float64 whose blocks add as much as the stream holds, and whose lambdas differ."""
    config = hf.DiffLlamaConfig(
        vocab_size=96,
        hidden_size=8 * n_heads,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv,
        initializer_range=0.3,
        lambda_std_dev=0.4,
        pad_token_id=0,
    )
    torch.manual_seed(3)
    model: Any = hf.DiffLlamaForCausalLM(config)
    model.set_attn_implementation(implementation)
    return nn.Module.to(model.eval(), torch.float64)


def differential_output(attention: Any, z_BTHD: Tensor) -> Tensor:
    """Compute by hand what an attention module gives of the outputs of its heads, as the paper has it."""
    first, second = z_BTHD.chunk(2, dim=2)
    exponents = [(attention.lambda_q1, attention.lambda_k1), (attention.lambda_q2, attention.lambda_k2)]
    rise, fall = (torch.exp(q @ k) for q, k in exponents)
    mixed = first - (rise - fall + attention.lambda_init) * second
    eps = attention.groupnorm.eps
    normed = mixed / (mixed.square().mean(-1, keepdim=True) + eps).sqrt() * (1 - attention.lambda_init)
    given: Tensor = normed.flatten(2) @ attention.o_proj.weight.T
    return given


OF_FLOAT32: Any = {"rtol": 1e-4, "atol": 1e-5}
"""Eager attention computes its softmax in float32, and every attention its lambda."""

SHAPES = [(4, 2, "sdpa"), (4, 4, "sdpa"), (8, 4, "eager")]


@pytest.mark.parametrize(("n_heads", "n_kv", "implementation"), SHAPES)
def test_differential_attention_has_values_and_head_outputs_of_twice_the_width(
    n_heads: int, n_kv: int, implementation: str
) -> None:
    model = diffllama(n_heads, n_kv, implementation)
    ids = torch.arange(5, 21).view(2, 8)
    attention = model.get_submodule("model.layers.1.self_attn")
    sites = resolve_sites(model, "v.1,z.1")
    assert sites["v.1"].row_shape == (n_kv, 16)
    assert sites["z.1"].row_shape == (n_heads, 16)
    assert "subtracts" in sites["z.1"].note
    seen: dict[str, Tensor] = {}
    projected: list[Tensor] = []
    handles = [
        attention.v_proj.register_forward_hook(lambda _m, _a, out: projected.append(out.view(2, 8, n_kv, 8))),
        attention.register_forward_hook(lambda _m, _a, out: projected.append(out[0])),
    ]
    with torch.no_grad(), tap(model, sites, seen.__setitem__):
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    first, second = (half.repeat(1, 1, 2, 1) for half in projected[0].chunk(2, dim=2))
    assert torch.equal(seen["v.1"], torch.cat([first, second], -1))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(input_ids=ids, output_attentions=True).attentions[1]
    values = seen["v.1"].repeat_interleave(n_heads // n_kv, dim=2)
    torch.testing.assert_close(seen["z.1"], torch.einsum("bhqk,bkhd->bqhd", weights, values), **OF_FLOAT32)
    torch.testing.assert_close(projected[1], differential_output(attention, seen["z.1"]), **OF_FLOAT32)


@pytest.mark.parametrize(("n_heads", "n_kv", "implementation"), SHAPES)
def test_what_is_put_into_differential_attention_acts_in_both_halves(
    n_heads: int, n_kv: int, implementation: str
) -> None:
    model = diffllama(n_heads, n_kv, implementation)
    ids = torch.arange(5, 21).view(2, 8)
    sites = resolve_sites(model, "v.1,z.1,q.1")
    scale = torch.tensor([2.0] * 8 + [-1.0] * 8, dtype=torch.float64)
    other = deepcopy(model)
    weight = other.get_submodule("model.layers.1.self_attn.v_proj").weight
    with torch.no_grad():
        weight[: len(weight) // 2] *= 2
        weight[len(weight) // 2 :] *= -1
        plain, expected = (each(input_ids=ids).logits for each in (model, other))
        for name in ("v.1", "z.1"):  # both are linear in the values
            with tap(model, {name: sites[name]}, lambda _name, tensor: tensor * scale):
                torch.testing.assert_close(model(input_ids=ids).logits, expected)
        assert not torch.allclose(plain, expected, atol=1e-3)
        with tap(model, {name: sites[name] for name in ("v.1", "z.1", "q.1")}, lambda _name, tensor: tensor.clone()):
            torch.testing.assert_close(model(input_ids=ids).logits, plain, rtol=0, atol=0)
        values, outputs = ({name: sites[name]} for name in ("v.1", "z.1"))
        with (
            tap(model, values, lambda _n, tensor: tensor * scale),
            tap(model, outputs, lambda _n, tensor: tensor / scale),
        ):
            torch.testing.assert_close(model(input_ids=ids).logits, plain)
        with tap(model, outputs, lambda _n, tensor: tensor * 0):
            gone = model(input_ids=ids).logits
        with hooked(model.get_submodule("model.layers.1.self_attn"), lambda _m, _a, out: (out[0] * 0, out[1])):
            torch.testing.assert_close(gone, model(input_ids=ids).logits)


def test_a_change_of_pattern_and_values_of_differential_attention_acts_together() -> None:
    model = diffllama(4, 2, "eager")
    ids = torch.arange(5, 21).view(2, 8)
    sites = resolve_sites(model, "v.1,z.1,pattern.1")
    uniform = (torch.ones(8, 8).tril() / torch.arange(1, 9)[:, None]).double()
    seen: dict[str, Tensor] = {}

    def change(name: str, tensor: Tensor) -> Tensor | None:
        seen[name] = tensor.clone()
        if name == "z.1":
            return None
        return tensor * 3 if name == "v.1" else uniform[:, None].expand_as(tensor)

    with torch.no_grad(), tap(model, sites, change):
        model(input_ids=ids)
    means = 3 * seen["v.1"].cumsum(1) / torch.arange(1, 9)[:, None, None]
    torch.testing.assert_close(seen["z.1"], means.repeat_interleave(2, dim=2), **OF_FLOAT32)


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gradients_flow_through_both_halves(implementation: str, is_checkpointed: bool) -> None:
    model = diffllama(4, 2, implementation)
    ids = torch.arange(5, 21).view(2, 8)
    sites = resolve_sites(model, "v.1,z.1")
    if is_checkpointed:
        model.activation_checkpointing_enable()
        model.train()
    attention = model.get_submodule("model.layers.1.self_attn")
    entered: list[Tensor] = []

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=ids, use_cache=False).logits.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    with hooked(attention.v_proj, lambda _m, args: entered.append(args[0].detach()), before=True):
        plain = gradients()
    seen: dict[str, Tensor] = {}
    with tap(model, sites, seen.__setitem__, backward=True):
        torch.testing.assert_close(gradients(), plain)
    assert {name: tuple(each.shape) for name, each in seen.items()} == {"v.1": (2, 8, 2, 16), "z.1": (2, 8, 4, 16)}
    # the weights of the values: the halves of a row are those of two heads, and each row uses both
    of_heads = seen["v.1"].sum(2).view(2, 8, 2, 8).flatten(2)
    torch.testing.assert_close(torch.einsum("bto,bti->oi", of_heads, entered[0]), attention.v_proj.weight.grad)


def test_two_attentions_of_other_queries_are_no_pair() -> None:
    model = build("causal", "longcat_flash")
    with pytest.raises(UnknownSiteError, match=r"v\.0.*2 times"):
        resolve_sites(model, "v.0")
