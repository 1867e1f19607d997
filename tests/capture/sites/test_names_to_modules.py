"""Which sites a model has, which it lacks and why, and ``module:`` sites of any torch module."""

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from residua.capture.sites.names_to_modules import model_sites, resolve_sites
from residua.capture.sites.shape_probe import measure_sites
from residua.capture.taps.reading import reading
from residua.store.base.errors import CaptureError, UnknownSiteError
from tests.capture.site_readings import batch, read, run
from tests.models.registries import build
from tests.models.tiny import ODD, TINY, VOCABULARY


@pytest.mark.parametrize("name", TINY)
def test_announced_sites_are_those_that_a_run_measures(name: str) -> None:
    model = TINY[name]()
    sites = {site: info for site, info in model_sites(model).items() if "pattern" not in site}
    assert measure_sites(model, sites) == sites


def test_sites_come_in_the_order_of_computation() -> None:
    model = TINY["gpt2"]()
    order: list[str] = []
    with reading(model, "*", lambda name, _tensor: order.append(name)):
        run(model)
    listed = list(model_sites(model))
    stages = [name for name in listed if not name.startswith("final")]  # final and the last block are one
    assert [name for name in order if not name.startswith("final")] == stages
    assert listed[0] == "embed"
    assert listed[-2:] == ["final", "logits"]


def test_grouped_heads_and_head_widths_are_exact() -> None:
    sites = model_sites(TINY["gemma2"]())
    assert sites["q.1"].row_shape == (4, 12)
    assert sites["k.1"].row_shape == (2, 12)
    assert sites["z.1"].row_shape == (4, 12)
    assert sites["pattern.1"].row_shape == (4, None)
    assert sites["mlp_act.1"].row_shape == (48,)
    assert sites["mlp_act.1"].where == "model.layers.1.mlp.down_proj input"


@pytest.mark.parametrize(
    ("name", "pattern", "words"),
    [
        ("phi", "resid_mid.*", ["side by side", "resid_pre, attn_out and mlp_out"]),
        ("gpt_neox", "resid_mid.1", ["side by side"]),
        ("mixtral", "mlp_act.*", ["mixture of experts", "mlp_out", "router_logits"]),
        ("qwen3_moe", "mlp_act.0", ["mixture of experts"]),
        ("llama", "resid_post.3", ["resid_post.0-2"]),
        ("llama", "module:model.layer.0", ["model.layers.0", "named_modules"]),
        ("llama", "logits_top98", ["97"]),
        ("bloom", "resid_post.3", ["resid_post.0-2"]),
    ],
)
def test_what_a_model_lacks_is_refused_with_a_remedy(name: str, pattern: str, words: list[str]) -> None:
    model = {**TINY, **ODD}[name]()
    with pytest.raises(UnknownSiteError) as caught:
        resolve_sites(model, pattern)
    for word in [pattern.partition(":")[2] or pattern, *words]:
        assert word in str(caught.value)


def test_every_remedy_for_experts_works() -> None:
    got = read(TINY["mixtral"](), "module:model.layers.0.mlp.gate@output.2,module:model.layers.0.mlp")
    tokens = batch().input_ids.shape
    assert got["module:model.layers.0.mlp.gate@output.2"].shape == (*tokens, 2)
    assert got["module:model.layers.0.mlp@output"].shape == (*tokens, 32)


def test_a_model_without_lm_head_has_no_logits() -> None:
    model = TINY["llama"]().base_model
    assert "final" in model_sites(model)
    with pytest.raises(UnknownSiteError, match="language modelling head"):
        resolve_sites(model, "logits")


def test_module_sites_of_a_language_model_are_measured() -> None:
    sites = resolve_sites(
        TINY["opt"](), "module:model.decoder.layers.0.fc1,module:model.decoder.layers.0.self_attn@input"
    )
    flat, separate = sites.values()
    assert (flat.row_shape, flat.dtype, flat.per_token, flat.flat) == ((48,), "float32", True, True)
    assert (separate.row_shape, separate.per_token, separate.flat) == ((32,), True, False)


def test_module_sites_agree_with_the_canonical_ones() -> None:
    model = TINY["llama"]()
    same = {
        "module:model.layers.1@input": "resid_pre.1",
        "module:model.layers.1@output": "resid_post.1",
        "module:model.layers.1.mlp.down_proj@input": "mlp_act.1",
    }
    got = read(model, [*same, *same.values()])
    assert all(torch.equal(got[name], got[canonical]) for name, canonical in same.items())


def test_measuring_changes_no_mode_and_no_random_state() -> None:
    model = TINY["gpt2"]()
    model.train(True)
    model.get_submodule("transformer.h.0.attn").eval()
    modes = [module.training for module in model.modules()]
    before = torch.random.get_rng_state()
    resolve_sites(model, "module:transformer.h.0.mlp")
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_item_that_is_not_a_tensor_is_named() -> None:
    with pytest.raises(CaptureError, match=r"item 1 is not a tensor.*NoneType"):
        read(TINY["llama"](), "module:model.layers.0.self_attn@output.1")


class Pixels(nn.Module):
    """A convolutional network as its user wrote it: no config, no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3)
        self.head = nn.Linear(5, 2)

    def forward(self, image: Tensor) -> Tensor:
        hidden: Tensor = self.stem(image).relu().mean((2, 3))
        logits: Tensor = self.head(hidden)
        return logits


def test_any_torch_module_is_read_by_its_modules() -> None:
    model, image = Pixels().eval(), torch.randn(4, 3, 8, 8)
    assert model_sites(model) == {}
    sites = resolve_sites(model, "module:stem,module:head@input")
    assert [(i.row_shape, i.dtype, i.per_token) for i in sites.values()] == 2 * [(None, None, False)]
    values: dict[str, Tensor] = {}
    with reading(model, sites, lambda name, tensor: values.update({name: tensor.clone()})) as taps:
        logits = model(image)
        taps.end_forward()
    assert torch.equal(values["module:stem@output"], nn.functional.conv2d(image, model.stem.weight, model.stem.bias))
    assert torch.equal(model.head(values["module:head@input"]), logits)
    with reading(model, "module:head", lambda _name, tensor: torch.zeros_like(tensor)):
        assert torch.equal(model(image), torch.zeros(4, 2))


def test_a_vision_transformer_has_module_sites() -> None:
    config = hf.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = hf.ViTModel(config, add_pooling_layer=False)
    model.train(False)
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 2) + ".1"
    pixels = torch.randn(3, 3, 8, 8)
    site = f"module:{name}@output"
    values: dict[str, Tensor] = {}
    with torch.no_grad():
        states = model(pixels, output_hidden_states=True).hidden_states
        with reading(model, site, lambda key, tensor: values.update({key: tensor.clone()})) as taps:
            model(pixels)
            taps.end_forward()
    assert values[site].shape == (3, 5, 16)
    assert torch.equal(values[site], states[-1])


def test_a_model_whose_block_runs_several_times_has_embedding_and_logits() -> None:
    config = hf.AlbertConfig(
        vocab_size=VOCABULARY, embedding_size=16, hidden_size=32, num_attention_heads=4, intermediate_size=48
    )
    model = hf.AlbertForMaskedLM(config)
    model.train(False)
    assert list(model_sites(model)) == ["embed", "logits"]
    with pytest.raises(UnknownSiteError) as refused:
        resolve_sites(model, "resid_post.0,q.0")
    text = str(refused.value)
    assert text.count("AlbertForMaskedLM has no list of blocks") == 1
    assert "resid_post" in text.partition("AlbertForMaskedLM")[0]
    assert "module:albert.encoder.albert_layer_groups.0@output" in text


REFUSED = {
    "audio/wav2vec2": ("resid_post.0", "Wav2Vec2", "'input_values'", "module:wav2vec2."),
    "seq2seq/fsmt": ("encoder.q.0", "FSMT", "the encoder and the decoder", "module:model.encoder.layers.0@output"),
    "seq2seq/mvp": ("decoder.attn_out.1", "'mvp'", "own code", "module:model.decoder.layers.0@output"),
    "seq2seq/prophetnet": ("encoder.z.0", "'prophetnet'", "no attention", "prophetnet.encoder.layers.0@output"),
    "masked/mobilebert": ("attn_out.0", "'mobilebert'", "all that follows", "bottleneck.dropout@output"),
    "masked/squeezebert": ("q.0", "'squeezebert'", "calls its forward directly", "layers.0.attention@output"),
    "masked/perceiver": ("resid_post.0", "Perceiver", "'inputs'", "module:perceiver.encoder.self_attends.0@output"),
    "masked/funnel": ("resid_post.0", "Funnel", "no list of blocks", "module:funnel.encoder.blocks.0.0@output"),
    "vision/swin": ("resid_post.0", "'swin'", "one entry for each token", "module:encoder.layers.0.blocks.0@output"),
}
"""A site that a type lacks, and what the message about it holds."""


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_model_the_cause_and_what_works(name: str) -> None:
    site, *words = REFUSED[name]
    with pytest.raises(UnknownSiteError) as refused:
        resolve_sites(build(*name.split("/")), site)
    missing = [word for word in (site, *words) if word not in str(refused.value)]
    assert not missing, str(refused.value)
