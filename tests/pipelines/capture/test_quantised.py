"""Quantised models: captured as they compute, known again, and left as they are."""

import copy
import shutil
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import residua
from residua.analysis.lens.lm_head import load_lm_head
from residua.capture.identity.fingerprint import weights_fingerprint
from residua.store.base.errors import PlanError
from tests.pipelines.small_capture import capture, make_tokens
from tests.stopped import take_back

TOKENS = make_tokens()[:3]
SITES = "resid_post.0,final,logits"
SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def llama(factor: float = 1.0) -> Any:
    """A tiny Llama with sizes that all kinds can pack."""
    torch.manual_seed(0)
    model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)
        model.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(factor)
    return model.train(False)


def dynamic(model: Any, dtype: torch.dtype) -> Any:
    import torch.ao.quantization as quantization

    return quantization.quantize_dynamic(model, {nn.Linear}, dtype)  # type: ignore[no-untyped-call]  # torch


def with_layers(model: Any, make: Callable[[nn.Linear], nn.Module]) -> Any:
    """Replace the linear layers in the blocks; values are packed when they are moved."""
    for path, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            new = make(module)
            new.load_state_dict(module.state_dict())
            model.model.layers.set_submodule(path, new)
    return model.to("cpu").train(False)


def in_four_bits(model: Any, kind: str, nested: bool) -> Any:
    layer: Any = import_module("bitsandbytes").nn.Linear4bit
    options = {"bias": False, "compute_dtype": torch.float32, "quant_type": kind, "compress_statistics": nested}
    return with_layers(model, lambda old: layer(old.in_features, old.out_features, **options))


def in_eight_bits(model: Any) -> Any:
    layer: Any = import_module("bitsandbytes").nn.Linear8bitLt
    return with_layers(model, lambda old: layer(old.in_features, old.out_features, bias=False, has_fp16_weights=False))


def by_torchao(model: Any, config: str) -> Any:
    quantization: Any = import_module("torchao.quantization")
    quantization.quantize_(model, getattr(quantization, config)())
    return model


torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
KINDS: list[Any] = [
    pytest.param(lambda model: dynamic(model, torch.qint8), id="dynamic int8"),
    pytest.param(lambda model: dynamic(model, torch.float16), id="dynamic float16"),
    pytest.param(lambda model: in_four_bits(model, "nf4", True), id="bitsandbytes nf4 nested"),
    pytest.param(lambda model: in_four_bits(model, "fp4", False), id="bitsandbytes fp4"),
    pytest.param(in_eight_bits, id="bitsandbytes int8"),
    pytest.param(lambda model: by_torchao(model, "Int8WeightOnlyConfig"), id="torchao int8", marks=torchao),
    pytest.param(lambda model: by_torchao(model, "Float8WeightOnlyConfig"), id="torchao float8", marks=torchao),
]
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization", "ignore:.*quantized tensor creation"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]


@pytest.mark.parametrize("quantise", KINDS)
def test_a_quantised_model_is_captured_and_known_again(quantise: Callable[[Any], Any], tmp_path: Path) -> None:
    model, fresh = quantise(llama()), quantise(llama())
    found = capture(model, TOKENS, tmp_path / "a.zarr", sites=SITES)
    archive = found.archive
    for example in (0, 2):
        with torch.no_grad():
            output = model(torch.tensor([TOKENS[example]]), output_hidden_states=True)
        stored = {site: torch.tensor(rows) for site, rows in archive.example(example).items() if site in archive}
        torch.testing.assert_close(stored["resid_post.0"], output.hidden_states[1][0], rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(stored["logits"], output.logits[0], rtol=1e-3, atol=1e-2)
    plain = llama()(torch.tensor([TOKENS[2]])).logits[0]
    assert not torch.equal(torch.tensor(archive.example(2)["logits"]), plain)
    if (archive.path / "head" / "head.json").exists():
        head, final = load_lm_head(archive.path / "head"), torch.tensor(archive["final"][:])
        torch.testing.assert_close(head.logits(final), torch.tensor(archive["logits"][:]), rtol=1e-3, atol=1e-2)
    else:
        assert any("LM head" in note for note in found.notes)
    shutil.copytree(archive.path, tmp_path / "b.zarr")
    take_back(tmp_path / "b.zarr", 1)
    with pytest.raises(PlanError, match=r"model\.weights"):
        capture(quantise(llama(3.0)), TOKENS, tmp_path / "b.zarr", sites=SITES)
    assert capture(fresh, TOKENS, tmp_path / "b.zarr", sites=SITES).archive.plan == archive.plan
    with residua.replay(model, archive, examples=[2], at="resid_post.0") as run:
        assert not any("another model" in note for note in run.notes)


@pytest.mark.parametrize("quantise", KINDS)
def test_neither_a_run_nor_the_fingerprint_changes_a_quantised_model(quantise: Callable[[Any], Any]) -> None:
    ids = torch.tensor([TOKENS[2]])
    with torch.no_grad():
        expected = quantise(llama())(ids).logits
        model = quantise(llama())
        first = weights_fingerprint(model)
        assert torch.equal(model(ids).logits, expected)
        assert weights_fingerprint(model) == first
        assert torch.equal(model(ids).logits, expected)
        assert weights_fingerprint(copy.deepcopy(model)) == first
    assert weights_fingerprint(quantise(llama(3.0))) != first
