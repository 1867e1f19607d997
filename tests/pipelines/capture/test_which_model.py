"""Which model this is, beyond its weights: adapters, packed weights, hooks and attributes of the user's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import residua
from residua.store.base.errors import CaptureError, PlanError
from tests.adapters import PeftModel, add_adapter
from tests.models.tiny import TINY
from tests.pipelines.small_capture import capture

Change = Callable[[PreTrainedModel], Any]
SITES = "resid_post.*"


def adapted() -> PreTrainedModel:
    model = TINY["llama"]()
    add_adapter(model, "q_proj", "v_proj")
    return model


def layers(model: PreTrainedModel) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith(("q_proj", "v_proj"))]


def switch_off(model: PreTrainedModel) -> None:
    for layer in layers(model):
        layer._disable_adapters = True


def scale(model: PreTrainedModel) -> None:
    scaling: Any = layers(model)[1].scaling
    scaling["default"] *= 1.5


def enlarge(_module: Any, _inputs: Any, output: Any) -> Any:
    return output * 1.1


def hook(model: PreTrainedModel) -> Any:
    return model.get_submodule("model.layers.1").register_forward_hook(enlarge)


def set_scaling(model: PreTrainedModel) -> None:
    attention: Any = model.get_submodule("model.layers.2.self_attn")
    attention.scaling *= 1.0001


def set_epsilon(model: PreTrainedModel) -> None:
    model.get_submodule("model.layers.0.input_layernorm").variance_epsilon = 1e-3  # type: ignore[assignment]  # a float


def set_activation(model: PreTrainedModel) -> None:
    model.get_submodule("model.layers.0.mlp").act_fn = nn.GELU()


def set_window(model: PreTrainedModel) -> None:
    model.get_submodule("model.layers.0.self_attn").sliding_window = 30  # type: ignore[assignment]  # not seen in few tokens


def replace_forward(model: PreTrainedModel) -> None:
    mlp = model.get_submodule("model.layers.1.mlp")
    forward = mlp.forward
    mlp.forward = lambda hidden: 0.9 * forward(hidden)


CHANGES: dict[str, tuple[Change, str]] = {
    "adapter off": (switch_off, r"q_proj\.adapters disabled: False.*True"),
    "adapter scaled": (scale, r"v_proj\.scaling: .*0\.5.*0\.75"),
    "hook": (hook, r"layers\.\*\.hooks.*test_which_model"),
    "scale": (set_scaling, r"self_attn\.scaling"),
    "epsilon": (set_epsilon, r"variance_epsilon.*0\.001"),
    "activation": (set_activation, r"act_fn\.class.*GELU"),
    "window": (set_window, r"sliding_window"),
    "forward": (replace_forward, r"mlp\.hooks: .*forward"),
}


class StopCaptureError(Exception):
    pass


def stopped(model: Any, tokens: list[list[int]], out: Path) -> None:
    def stop(stats: Any) -> None:
        if stats.rows >= 48:
            raise StopCaptureError

    with pytest.raises(StopCaptureError):
        capture(model, tokens, out, sites=SITES, on_batch=stop)


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_changed_model_is_refused_and_the_change_named(name: str, tokens: list[list[int]], tmp_path: Path) -> None:
    change, named = CHANGES[name]
    model = adapted()
    stopped(model, tokens, tmp_path / "a.zarr")
    whole = capture(model, tokens, tmp_path / "whole.zarr", sites=SITES).archive
    change(model)
    with pytest.raises(PlanError, match=named):
        capture(model, tokens, tmp_path / "a.zarr", sites=SITES)
    with pytest.raises(PlanError, match=named), residua.replay(model, whole, examples=[0], at="resid_post.0"):
        pass
    with residua.replay(model, whole, examples=[0], at="resid_post.0", force=True) as run:
        assert any("force" in note for note in run.notes)


def test_a_change_that_is_taken_back_is_none(tokens: list[list[int]], tmp_path: Path) -> None:
    model = adapted()
    stopped(model, tokens, tmp_path / "a.zarr")
    switch_off(model)
    handle = hook(model)
    for layer in layers(model):
        layer._disable_adapters = False
    handle.remove()
    model.register_forward_hook(lambda *_: None)  # it only looks
    found = capture(model, tokens, tmp_path / "a.zarr", sites=SITES)
    assert not any("output" in note or "hooks" in note for note in found.notes)
    ids = torch.tensor([tokens[2]])
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states[2][0]
    torch.testing.assert_close(torch.tensor(found.archive.example(2)["resid_post.1"]), expected)


def test_running_a_model_changes_nothing(tokens: list[list[int]], tmp_path: Path) -> None:
    model = TINY["llama"]()
    capture(model, tokens, tmp_path / "a.zarr", sites=SITES)
    model.generate(torch.tensor([tokens[0]]), max_new_tokens=3, attention_mask=torch.ones(1, 5))  # type: ignore[operator]  # transformers
    model(torch.tensor([tokens[2]]), labels=torch.tensor([tokens[2]])).loss.backward()
    with residua.replay(model, tmp_path / "a.zarr", examples=[0]) as run:
        assert not any("output" in note for note in run.notes)


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_a_wrapped_model_is_the_model_inside(wrapped_first: bool, tokens: list[list[int]], tmp_path: Path) -> None:
    model = adapted()
    pair: list[Any] = [PeftModel(model), model]
    first, second = pair if wrapped_first else pair[::-1]
    stopped(first, tokens, tmp_path / "a.zarr")
    archive = capture(second, tokens, tmp_path / "a.zarr", sites=SITES).archive
    with torch.no_grad():
        expected = first(torch.tensor([tokens[2]]), output_hidden_states=True).hidden_states[2][0]
    torch.testing.assert_close(torch.tensor(archive.example(2)["resid_post.1"]), expected)
    described: Any = archive.provenance["model"]
    assert described["adapters"]["default"] == {
        "peft_type": "LORA",
        "r": "2",
        "target_modules": "['q_proj', 'v_proj']",
    }
    with residua.replay(first, archive, examples=[2], at="resid_post.0") as run, torch.no_grad():
        torch.testing.assert_close(run.logits[0], first(torch.tensor([tokens[2]])).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"is_prompt_learning": True, "peft_type": "PREFIX_TUNING"}, {"alora_invocation_tokens": [3]}]
)
def test_adapters_on_the_inputs_are_refused(settings: Any, tokens: list[list[int]], tmp_path: Path) -> None:
    wrapped: Any = PeftModel(TINY["llama"](), **settings)
    with pytest.raises(CaptureError, match=str(settings.get("peft_type", "LORA"))):
        capture(wrapped, tokens, tmp_path / "a.zarr", sites=SITES)
    assert not (tmp_path / "a.zarr").exists()


def quantised(factor: float = 1.0) -> PreTrainedModel:
    import torch.ao.quantization as quantization

    model = TINY["llama"]()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(factor)
    made: PreTrainedModel = quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)  # type: ignore[no-untyped-call]  # torch
    return made


@pytest.mark.filterwarnings("ignore:torch.ao.quantization", "ignore:.*quantized tensor creation")
def test_a_quantised_model_is_captured_and_known_again(tokens: list[list[int]], tmp_path: Path) -> None:
    model = quantised()
    stopped(model, tokens, tmp_path / "a.zarr")
    with pytest.raises(PlanError, match=r"model\.weights"):
        capture(quantised(3.0), tokens, tmp_path / "a.zarr", sites=SITES)
    archive = capture(quantised(), tokens, tmp_path / "a.zarr", sites=SITES).archive
    with torch.no_grad():
        expected = model(torch.tensor([tokens[0]]), output_hidden_states=True).hidden_states[1][0]
    # quantisation is by the range of a batch: other examples in it move values
    torch.testing.assert_close(torch.tensor(archive.example(0)["resid_post.0"]), expected, rtol=0.1, atol=1.0)
    with pytest.raises(PlanError, match="weights"), residua.replay(quantised(3.0), archive, examples=[0]):
        pass
