"""Replacements have the effect of a hand-written hook."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from residua.capture.sites.names_to_modules import model_sites
from residua.capture.taps.reading import reading
from residua.store.base.errors import CaptureError
from tests.capture.manual_hooks import FAMILIES, hooked, replaced
from tests.capture.site_readings import attention, batch, read, run
from tests.models.tiny import ODD, TINY


@FAMILIES
def test_putting_back_the_same_values_changes_no_bit(name: str) -> None:
    model = TINY[name]()
    with attention(model, "eager"):
        before = run(model)
        assert torch.equal(replaced(model, "*", torch.clone), before)


@FAMILIES
def test_every_site_of_a_block_reaches_the_logits(name: str) -> None:
    model = TINY[name]()
    sites = [site for site in model_sites(model) if site.endswith(".1") or site in ("embed", "final")]
    with attention(model, "eager"):
        before = run(model)
        for site in sites:
            after = replaced(model, site, lambda tensor: tensor.flip(1))
            assert not torch.allclose(after, before, atol=1e-4), site
        assert torch.equal(run(model), before)
        assert torch.equal(replaced(model, "logits", torch.zeros_like), torch.zeros_like(before))


_MLPS = {
    "llama": "model.layers.1.mlp",
    "gpt2": "transformer.h.1.mlp",
    "opt": "model.decoder.layers.1.fc2",
    "mixtral": "model.layers.1.mlp",
    "phi": "model.layers.1.mlp",
    "gemma2": "model.layers.1.post_feedforward_layernorm",
    "bert": "bert.encoder.layer.1.output.dense",
}


@pytest.mark.parametrize("name", _MLPS)
def test_zeroing_mlp_out_does_what_a_hand_written_hook_does(name: str) -> None:
    model = TINY[name]()
    module = model.get_submodule(_MLPS[name])
    with hooked(module, lambda _module, _args, output: torch.zeros_like(output)):
        by_hand = run(model)
    assert torch.equal(replaced(model, "mlp_out.1", torch.zeros_like), by_hand)
    assert not torch.equal(by_hand, run(model))


_PROJECTIONS = {
    "llama": "model.layers.1.self_attn.o_proj",
    "gpt2": "transformer.h.1.attn.c_proj",
    "opt": "model.decoder.layers.1.self_attn.out_proj",
    "gpt_neox": "gpt_neox.layers.1.attention.dense",
    "bert": "bert.encoder.layer.1.attention.output.dense",
}


@pytest.mark.parametrize("name", _PROJECTIONS)
def test_ablating_a_head_does_what_a_hand_written_hook_does(name: str) -> None:
    model = TINY[name]()

    def without_head_2(args: tuple[Tensor, ...]) -> Tensor:
        heads = args[0].reshape(*args[0].shape[:2], 4, -1).clone()
        heads[:, :, 2] = 0
        return heads.reshape(args[0].shape)

    def change(tensor: Tensor) -> Tensor:
        return tensor.index_fill(2, torch.tensor([2]), 0.0)

    with hooked(model.get_submodule(_PROJECTIONS[name]), lambda _m, a: (without_head_2(a),), before=True):
        by_hand = run(model)
    assert torch.equal(replaced(model, "z.1", change), by_hand)


def test_queries_of_zero_attend_evenly() -> None:
    model = TINY["llama"]()
    patterns: dict[str, Tensor] = {}

    def change(name: str, tensor: Tensor) -> Tensor | None:
        if name == "q.1":
            return torch.zeros_like(tensor)
        patterns[name] = tensor.clone()
        return None

    with reading(model, "q.1,pattern.1", change):
        run(model)
    even = torch.ones(11, 11).tril() / torch.arange(1, 12)[:, None]
    torch.testing.assert_close(patterns["pattern.1"][0], even[:, None].expand(11, 4, 11))


def test_a_pattern_that_looks_only_at_itself_gives_the_values() -> None:
    model = TINY["llama"]()
    got: dict[str, Tensor] = {}

    def change(name: str, tensor: Tensor) -> Tensor | None:
        got[name] = tensor.clone()
        itself = torch.eye(tensor.shape[1])[None, :, None, :]
        return itself.expand_as(tensor).contiguous() if name == "pattern.1" else None

    with reading(model, "v.1,pattern.1,z.1", change):
        run(model)
    assert torch.equal(got["z.1"], got["v.1"].repeat_interleave(2, dim=2))


@pytest.mark.parametrize("name", [name for name in TINY if name not in ("phi", "gpt_neox")])
def test_a_block_continues_with_the_replaced_stream(name: str) -> None:
    model = TINY[name]()
    changed: list[Tensor] = []

    def change(site: str, tensor: Tensor) -> Tensor | None:
        if site == "resid_mid.1":
            changed.append(tensor * -2.0 + 1.0)
            return changed[0]
        return None

    def both(site: str, tensor: Tensor) -> Tensor | None:
        values[site] = tensor.clone()
        return change(site, tensor)

    values: dict[str, Tensor] = {}
    with reading(model, "resid_mid.1,mlp_out.1,resid_post.1", both):
        run(model)
    summed = changed[0] + values["mlp_out.1"]
    norm = {"bert": "bert.encoder.layer.1.output.LayerNorm"}.get(name)
    norm = "model.decoder.layers.1.final_layer_norm" if name == "opt-post-norm" else norm
    with torch.no_grad():
        expected = model.get_submodule(norm)(summed) if norm else summed
    assert torch.equal(values["resid_post.1"], expected)


@pytest.mark.parametrize("name", ["bloom", "gptj"])
def test_the_other_items_of_a_tuple_are_kept(name: str) -> None:
    model = ODD[name]()
    module = model.get_submodule("transformer.h.1")

    def by_hand(_module: nn.Module, _args: object, output: Any) -> Any:
        assert isinstance(output, tuple)
        assert len(output) > 1
        return (output[0] * 2, *output[1:])

    with hooked(module, by_hand):
        expected = run(model)
    assert torch.equal(replaced(model, "resid_post.1", lambda tensor: tensor * 2), expected)
    assert torch.equal(replaced(model, "module:transformer.h.1@output.0", lambda tensor: tensor * 2), expected)


def test_gradients_flow_through_a_replacement_in_the_stream() -> None:
    model = nn.Module.double(TINY["gpt2"]())
    shift = torch.zeros(32, dtype=torch.float64, requires_grad=True)

    def loss(vector: Tensor) -> Tensor:
        with reading(model, "resid_mid.1", lambda _name, tensor: tensor + vector):
            logits: Tensor = model(batch().input_ids, use_cache=False).logits
        return logits.square().mean()

    loss(shift).backward()  # type: ignore[no-untyped-call]  # torch has no types here
    assert shift.grad is not None
    step = torch.zeros(32, dtype=torch.float64)
    step[5] = 1e-5
    with torch.no_grad():
        slope = (loss(step) - loss(-step)) / 2e-5
    torch.testing.assert_close(shift.grad[5], slope, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda tensor: tensor[:, :1], "32"),
        (lambda tensor: tensor.double(), "float64"),
        (lambda tensor: tensor.tolist(), "list"),
    ],
)
def test_a_replacement_that_does_not_fit_is_refused(wrong: Callable[[Tensor], Any], words: str) -> None:
    with pytest.raises(CaptureError, match=words) as caught:
        replaced(TINY["llama"](), "mlp_out.1", wrong)
    assert "mlp_out.1" in str(caught.value)


def test_the_largest_logits_are_read_in_two_halves_and_not_replaced() -> None:
    model = TINY["gpt2"]()
    got = read(model, "logits_top5,logits")
    expected = got["logits"].sort(dim=-1, descending=True)
    assert torch.equal(got["logits_top5.values"], expected.values[..., :5])
    assert got["logits_top5.indices"].dtype == torch.int32
    picked = got["logits"].gather(-1, got["logits_top5.indices"].long())
    assert torch.equal(picked, got["logits_top5.values"])
    with pytest.raises(CaptureError, match="replace 'logits'"):
        replaced(model, "logits_top5.values", torch.clone)
