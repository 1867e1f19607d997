"""Views of a run compared with the model's own modules: lenses, attribution, patterns, and what the plots show."""

from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import PreTrainedModel

import residua
from residua.analysis.lens.checkpoint import LensConfig, Translator, hash_unembedding
from residua.analysis.lens.lens import TunedLens
from residua.analysis.lens.lm_head import LMHead
from residua.capture.identity.lm_head import lm_head_of
from residua.store.base.errors import PlanError
from tests.models.tiny import LAYERS, TINY, VOCABULARY

RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(3, VOCABULARY, n).tolist() for n in (6, 9)]
NORMS = {"llama": "model.norm", "gpt2": "transformer.ln_f", "gemma2": "model.norm"}


@pytest.fixture(autouse=True)
def _no_window() -> None:
    mpl.use("agg")


def axes() -> Axes:
    return Figure().add_subplot()


def states(model: PreTrainedModel, ids: list[int]) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), output_hidden_states=True)


def stream_of(model: PreTrainedModel, ids: list[int]) -> list[Tensor]:
    """Return the input of each block and the output of the last one: hidden_states[-1] is after the final norm."""
    last: list[Tensor] = []
    norm = model.get_submodule(NORMS[next(name for name in NORMS if name in str(model.config.model_type))])
    handle = norm.register_forward_pre_hook(lambda _module, args: last.append(args[0][0]))
    found = [hidden[0] for hidden in states(model, ids).hidden_states[:-1]]
    handle.remove()
    return [*found, last[0]]


def decoded(model: PreTrainedModel, name: str, hidden: Tensor) -> Tensor:
    whole: Any = model
    with torch.no_grad():
        logits: Tensor = whole.get_output_embeddings()(model.get_submodule(NORMS[name])(hidden))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("name", NORMS)
def test_the_logit_lens_decodes_each_layer(name: str) -> None:
    model = TINY[name]()
    view = residua.run(model, PROMPTS).logit_lens()
    assert view.sites == ("resid_pre.0", *(f"resid_post.{layer}" for layer in range(LAYERS)))
    lines = view.table.to_pylist()
    for example, ids in enumerate(PROMPTS):
        own = states(model, ids).logits[0].log_softmax(-1)
        for layer, hidden in enumerate(stream_of(model, ids)):
            logits = decoded(model, name, hidden).log_softmax(-1)
            mine = [line for line in lines if (line["example"], line["layer"]) == (example, layer)]
            assert [line["top"] for line in mine] == logits.argmax(-1).tolist()
            kl = F.kl_div(logits, own, log_target=True, reduction="none").sum(-1)
            np.testing.assert_allclose([line["kl"] for line in mine], kl, rtol=1e-3, atol=1e-4)
            losses = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
            np.testing.assert_allclose([line["loss"] for line in mine[:-1]], losses, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(
                [line["top_probability"] for line in mine], logits.exp().amax(-1), rtol=1e-3, atol=1e-5
            )
    for value in ("top_probability", "kl", "loss"):
        shown: Any = view.plot(1, value=value, ax=axes()).images[0].get_array()
        column = [line[value] for line in lines if line["example"] == 1]
        expected = np.array([np.nan if one is None else one for one in column]).reshape(LAYERS + 1, len(PROMPTS[1]))
        np.testing.assert_allclose(np.ma.filled(shown, np.nan), expected[::-1], rtol=1e-6)
    with pytest.raises(PlanError, match="example 2"):
        view.plot(2, ax=axes())


def test_a_tuned_lens_maps_before_it_decodes() -> None:
    model = TINY["llama"]()
    spec, parameters = lm_head_of(model)
    weight, bias = torch.randn(32, 32) * 0.1, torch.randn(32)
    config = LensConfig(
        base_model_name_or_path="tiny",
        d_model=32,
        num_hidden_layers=LAYERS,
        unembed_hash=hash_unembedding(parameters["unembed.weight"]),
    )
    lens = TunedLens(LMHead(spec, parameters), {1: Translator(weight, bias)}, config)
    view = residua.run(model, PROMPTS).tuned_lens(lens)
    assert view.sites == ("resid_post.0", f"resid_post.{LAYERS - 1}")
    stream = stream_of(model, PROMPTS[0])
    mapped = stream[1] @ weight + bias
    top = [line["top"] for line in view.table.to_pylist() if line["example"] == 0]
    expected = [decoded(model, "llama", hidden).argmax(-1).tolist() for hidden in (mapped, stream[-1])]
    assert top == [*expected[0], *expected[1]]
    with pytest.raises(PlanError, match="unembedding"):
        residua.run(TINY["gpt2"](), PROMPTS).tuned_lens(lens)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_neox", "opt-post-norm"])
def test_components_add_up_to_the_logit(name: str) -> None:
    model = TINY[name]()
    run = residua.run(model, PROMPTS)
    found = run.attribution("logit", 7)
    for example, ids in enumerate(PROMPTS):
        logit = float(states(model, ids).logits[0, -1, 7])
        if name == "gemma2":  # before the soft cap
            logit = 10.0 * np.arctanh(logit / 10.0)
        lines = found.table.to_pylist()
        added = sum(line["contribution"] for line in lines if line["example"] == example)
        assert added == pytest.approx(logit, rel=2e-3, abs=1e-3)
        assert found.logits[example] == pytest.approx(added)
        other = [line for line in lines if line["component"] == "other"]
        assert max(abs(line["contribution"]) for line in other) < 1e-2
    difference = run.attribution("logit_difference", [7, 8], position=2).logits[1]
    separate = [run.attribution("logit", token, position=2).logits[1] for token in (7, 8)]
    assert difference == pytest.approx(separate[0] - separate[1], abs=1e-6)
    patches: Any = found.plot(1, ax=axes()).patches
    bars = [bar.get_width() for bar in patches]
    assert bars == [line["contribution"] for line in found.table.to_pylist() if line["example"] == 1]


def test_each_component_is_what_its_module_adds() -> None:
    model: Any = TINY["llama"]()
    ids = PROMPTS[1]
    added: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _args: object, output: Any) -> None:
            added[name] = (output if isinstance(output, Tensor) else output[0])[0, 4].double()

        return hook

    handles = [model.get_submodule("model.embed_tokens").register_forward_hook(keep("embed"))]
    for layer in range(LAYERS):
        for part, path in (("attn_out", "self_attn"), ("mlp_out", "mlp")):
            module = model.get_submodule(f"model.layers.{layer}.{path}")
            handles.append(module.register_forward_hook(keep(f"{part}.{layer}")))
    final = stream_of(model, ids)[-1][4].double()
    for handle in handles:
        handle.remove()
    norm: Any = model.get_submodule("model.norm")
    direction = (model.get_output_embeddings().weight[7].double() * norm.weight.double()).detach()
    scale = (final.pow(2).mean() + norm.variance_epsilon).sqrt()
    table = residua.run(model, [ids]).attribution("logit", 7, position=4).table
    found = dict(zip(table["component"].to_pylist(), table["contribution"].to_pylist(), strict=True))
    for name, values in added.items():
        assert found[name] == pytest.approx(float(values @ direction / scale), rel=1e-3, abs=1e-4), name


def test_attribution_refuses_what_is_no_sum() -> None:
    run = residua.run(TINY["llama"](), PROMPTS)
    for metric, token, position, words in (
        ("logit", VOCABULARY, -1, "token 97"),
        ("logit", 3, 6, "position 6"),
        ("logit", [3, 4], -1, "one token"),
        ("loss", 3, -1, "loss"),
        ("logit", " Paris", -1, "tokenizer"),
    ):
        given: Any = metric
        with pytest.raises(PlanError, match=words):
            run.attribution(given, token, position=position)
    with pytest.raises(PlanError, match="activation"):
        residua.run(TINY["bert"](), PROMPTS).attribution("logit", 3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_patterns_are_those_of_eager_attention(name: str) -> None:
    model = TINY[name]()
    shown: Any = residua.run(model, PROMPTS).pattern_plot(1, 2, example=1, ax=axes()).images[0].get_array()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([PROMPTS[1]]), output_attentions=True).attentions[1][0, 2]
    np.testing.assert_allclose(np.asarray(shown), expected, atol=1e-5)
    with pytest.raises(PlanError, match="head 4"):
        residua.run(model, PROMPTS).pattern_plot(1, 4, ax=axes())
