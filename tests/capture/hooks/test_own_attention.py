"""Attention in a model's own code: what is read, against output_attentions and products in float64; what is put in."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import residua
from residua.capture.identity.sidecars import attention_files
from residua.capture.sites.names_to_modules import model_sites, resolve_sites
from residua.capture.taps.tap import tap
from residua.store.base.errors import CaptureError, UnknownSiteError
from residua.store.format.sidecars import AttentionSpec, attention_from_json
from tests.models.tiny import LAYERS, ODD
from tests.unlike_models import UNLIKE

IDS = torch.randint(5, 97, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, 6:] = 0
KINDS = ("q", "k", "v", "z", "pattern")
OWN = {
    "bloom": "transformer.h.1.self_attention.dense",
    "falcon": "transformer.h.1.self_attention.dense",
    "gpt_neo": "transformer.h.1.attn.attention.out_proj",
    "gptj": "transformer.h.1.attn.out_proj",
    "mpt": "transformer.blocks.1.attn.out_proj",
    "roformer": "roformer.encoder.layer.1.attention.output.dense",
    "xglm": "model.layers.1.self_attn.out_proj",
    "xlm": "transformer.attentions.1.out_lin",
}
"""The projection of the head outputs of block 1."""
SCALES = {"gptj": 8**-0.5, "roformer": 8**-0.5, "falcon": 8**-0.5, "gpt_neo": 1.0, "xglm": 1.0, "xlm": 1.0}
"""By what the product of queries and keys is multiplied; in the others a bias is added."""


@cache
def model_of(name: str) -> PreTrainedModel:
    """The model as a user loads it with eager attention, which alone gives weights."""
    made = {**ODD, **UNLIKE}[name]()
    made.config._attn_implementation = "eager"
    return made


def run(model: PreTrainedModel, **options: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK, **options)


@cache
def read(name: str) -> tuple[dict[str, Tensor], Tensor]:
    kept: dict[str, Tensor] = {}
    with tap(model_of(name), [f"{kind}.*" for kind in KINDS], kept.__setitem__):
        logits = run(model_of(name)).logits
    return kept, logits


@pytest.mark.parametrize("name", OWN)
def test_sites_are_what_transformers_gives_and_make_each_other(name: str) -> None:
    model, (kept, logits) = model_of(name), read(name)
    plain = run(model, output_attentions=True)
    assert torch.equal(logits, plain.logits)
    for layer in range(LAYERS):
        q, k, v, z, pattern = (kept[f"{kind}.{layer}"].double() for kind in KINDS)
        assert torch.equal(kept[f"pattern.{layer}"].transpose(1, 2), plain.attentions[layer])
        k, v = (each.repeat_interleave(q.shape[2] // each.shape[2], 2) for each in (k, v))
        torch.testing.assert_close(torch.einsum("bqhk,bkhd->bqhd", pattern, v), z, rtol=1e-5, atol=1e-6)
        if name in SCALES:
            scores = torch.einsum("bqhd,bkhd->bqhk", q, k) * SCALES[name]
            weights = scores.masked_fill(pattern == 0, -torch.inf).softmax(-1)
            torch.testing.assert_close(weights[1], pattern[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OWN)
def test_what_is_put_back_changes_nothing_and_what_is_put_in_acts(name: str) -> None:
    model, (_, logits) = model_of(name), read(name)
    sites = [f"{kind}.*" for kind in KINDS]
    with tap(model, sites, lambda _site, tensor: tensor.clone()):
        assert torch.equal(run(model).logits, logits)
    taken: list[Tensor] = []
    handle = model.get_submodule(OWN[name]).register_forward_pre_hook(lambda _m, args: taken.append(args[0].clone()))
    kept: dict[str, Tensor] = {}
    changed, seen = resolve_sites(model, "q.1,z.1"), resolve_sites(model, "pattern.1,v.1,z.1")
    taken.clear()

    def change(site: str, tensor: Tensor) -> Tensor:
        return tensor.flip(1) if site == "q.1" else tensor.flip(2) + 1.0

    with tap(model, changed, change), tap(model, seen, kept.__setitem__):  # the second one sees what the first did
        run(model)
    handle.remove()
    torch.testing.assert_close(kept["z.1"].flatten(2), taken[0].view(*IDS.shape, -1))
    values = kept["v.1"].repeat_interleave(kept["pattern.1"].shape[2] // kept["v.1"].shape[2], 2)
    product = torch.einsum("bqhk,bkhd->bqhd", kept["pattern.1"], values)
    torch.testing.assert_close(product.flip(2) + 1.0, kept["z.1"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(kept["pattern.1"], read(name)[0]["pattern.1"], atol=1e-3)


@pytest.mark.parametrize("name", ["bloom", "gptj", "xglm"])
def test_gradients_are_those_of_the_projections_input(name: str) -> None:
    model = model_of(name)
    expected: list[Tensor] = []

    def listen(_module: object, args: tuple[Tensor, ...]) -> None:
        args[0].register_hook(expected.append)  # type: ignore[no-untyped-call]  # torch has no annotations here

    sites = resolve_sites(model, "z.1,q.0")
    handle = model.get_submodule(OWN[name]).register_forward_pre_hook(listen)
    kept: dict[str, Tensor] = {}
    with tap(model, sites, kept.__setitem__, backward=True):
        model(input_ids=IDS, attention_mask=MASK).logits.square().mean().backward()
    handle.remove()
    torch.testing.assert_close(kept["z.1"].flatten(2), expected[0].view(*IDS.shape, -1))
    assert kept["q.0"].abs().max() > 0


def test_only_what_is_read_is_watched() -> None:
    model = model_of("bloom")
    modules = [model.get_submodule(f"transformer.h.{layer}.self_attention") for layer in range(LAYERS)]
    sites = resolve_sites(model, "q.1,resid_post.*")

    def n_hooks() -> list[int]:
        return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules]

    with tap(model, sites, lambda *_: None):
        assert n_hooks() == [0, 2, 0]
        run(model)
    with pytest.raises(ValueError, match="mine"), tap(model, sites, _fail):
        run(model)
    assert n_hooks() == [0, 0, 0]
    assert torch.equal(run(model).logits, read("bloom")[1])


def _fail(_site: str, _tensor: Tensor) -> None:
    raise ValueError("mine")


def test_attention_that_takes_other_steps_later_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ODD["gptj"]()
    sites = resolve_sites(model, "q.1,z.1")
    attention: Any = model.get_submodule("transformer.h.1.attn")
    plain = attention._attn
    monkeypatch.setattr(
        attention, "_attn", lambda q, k, v, mask: plain(q @ torch.eye(8).expand(2, 4, 8, 8), k, v, mask)
    )
    with pytest.raises(CaptureError, match="other steps"), tap(model, sites, lambda *_: None):
        run(model)


def test_fused_attention_is_read_as_it_is_and_patterns_switch_to_eager() -> None:
    model = UNLIKE["falcon"]()
    assert model.config._attn_implementation == "sdpa"
    eager, _ = read("falcon")
    kept: dict[str, Tensor] = {}
    with tap(model, "q.*,v.*,z.*", kept.__setitem__):
        assert model.config._attn_implementation == "sdpa"
        run(model)
    with tap(model, "pattern.2", kept.__setitem__):
        run(model)
    assert model.config._attn_implementation == "sdpa"
    for site, value in kept.items():
        torch.testing.assert_close(value[1], eager[site][1], rtol=1e-4, atol=1e-5)


def test_a_pattern_is_refused_where_eager_attention_gives_other_outputs() -> None:
    model = UNLIKE["falcon-alibi"]()  # transformers scales the bias in one of the two only
    assert "q.0" in model_sites(model)
    with pytest.raises(UnknownSiteError, match=r"pattern\.0.*fused"):
        resolve_sites(model, "pattern.0")


def test_replay_from_head_outputs_gives_the_captured_logits(tmp_path: Any) -> None:
    model = ODD["bloom"]()
    examples = [[5, 9, 30, 7, 12], [6, 11, 4, 77, 50, 23, 9]]
    archive = residua.capture_dataset(model, examples, sites="z.*,pattern.1,q.1,k.1", out=tmp_path / "a.zarr").archive
    with residua.replay(model, archive, examples=[1], at="z.1") as again:
        replayed = again.logits[0]
    with torch.no_grad():
        torch.testing.assert_close(replayed, model(input_ids=torch.tensor(examples[1:])).logits[0])


@pytest.mark.parametrize(("name", "scale"), [("gptj", 8**-0.5), ("xglm", 1.0), ("bloom", None), ("gpt_neo", None)])
def test_weights_follow_from_stored_queries_and_keys_or_the_reason_is_kept(name: str, scale: float | None) -> None:
    model = model_of(name)
    files = attention_files(model, resolve_sites(model, "q.*,k.*"))
    facts = attention_from_json(b"".join(bytes(piece) for piece in files["attention.json"]))
    if scale is None:
        assert all(isinstance(fact, str) for fact in facts.values())
        assert ("window" if name == "gpt_neo" else "differ") in str(facts[1])
    else:
        assert facts == dict.fromkeys(
            range(LAYERS), AttentionSpec(scale=scale, causal=True, softcap=None, window=None, sinks=None)
        )
