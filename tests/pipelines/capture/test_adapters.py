"""Adapters of PEFT: captured as the model inside with its adapters, known again, or refused by name."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import residua
from residua.store.base.errors import CaptureError, PlanError, ResiduaError
from tests.adapters import adapted, lora
from tests.models.tiny import TINY
from tests.pipelines.small_capture import capture, make_tokens
from tests.stopped import take_back

SITES = "embed,resid_post.*"
TOKENS = make_tokens()[:8]


def two_adapters() -> Any:
    return adapted(TINY["llama"](), lora("q_proj", "v_proj"), lora("q_proj", "down_proj"), names=("one", "two"))


def mix(model: Any) -> None:
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mixed", combination_type="cat")
    model.set_adapter("mixed")


def scale(model: Any) -> None:
    model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj").scale_layer(0.5)


def merge(model: Any) -> Any:
    return model.merge_and_unload()


CHANGES: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "off": (lambda model: model.base_model.disable_adapter_layers(), ("q_proj.adapters disabled: False", "True here")),
    "switched": (lambda model: model.set_adapter("two"), ("q_proj.active adapters: ['one']", "['two'] here")),
    "both": (lambda model: model.base_model.set_adapter(["one", "two"]), ("active adapters", "['one', 'two'] here")),
    "scaled": (scale, ("q_proj.scaling", "'one': 2.0")),
    "mixed": (mix, ("adapters: one, two in the archive, mixed, one, two here", "active adapters: ['one']")),
    "merged": (merge, ("adapters: one, two in the archive, none here",)),
}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A model with two adapters, a stopped archive and a sealed one of it."""
    model, folder = two_adapters(), tmp_path_factory.mktemp("adapters")
    capture(model, TOKENS, folder / "whole.zarr", sites=SITES)
    shutil.copytree(folder / "whole.zarr", folder / "stopped.zarr")
    take_back(folder / "stopped.zarr", 2, 3)
    return model, folder / "stopped.zarr", folder / "whole.zarr"


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_with_changed_adapters_is_refused_and_the_change_named(
    name: str, archives: tuple[Any, Path, Path]
) -> None:
    change, words = CHANGES[name]
    model = copy.deepcopy(archives[0])
    model = change(model) or model
    with pytest.raises(PlanError) as resumed:
        capture(model, TOKENS, archives[1], sites=SITES)
    with pytest.raises(PlanError) as replayed, residua.replay(model, archives[2], examples=[0], at="resid_post.0"):
        pass
    for word in words:
        assert word in str(resumed.value)
        assert word in str(replayed.value)
    with residua.replay(model, archives[2], examples=[0], at="resid_post.0", force=True) as run:
        assert any("force" in note and words[0] in note for note in run.notes)


def test_a_capture_goes_on_with_the_same_adapters_and_with_the_model_inside(archives: tuple[Any, Path, Path]) -> None:
    model, stopped, _ = archives
    model.base_model.disable_adapter_layers()
    model.set_adapter("two")
    model.base_model.enable_adapter_layers()
    model.set_adapter("one")
    archive = capture(model.get_base_model(), TOKENS, stopped, sites=SITES).archive
    for example in range(len(TOKENS)):
        with torch.no_grad():
            states = model(torch.tensor([TOKENS[example]]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(torch.tensor(archive.example(example)["embed"]), states[0][0])
        torch.testing.assert_close(
            torch.tensor(archive.example(example)["resid_post.1"]), states[2][0], rtol=1e-4, atol=1e-4
        )
    described: Any = archive.provenance["model"]
    assert set(described["adapters"]) == {"one", "two"}
    assert described["adapters"]["two"]["target_modules"] == "['down_proj', 'q_proj']"
    assert described["adapters"]["one"]["peft_type"] == "LORA"
    with residua.replay(model, archive, examples=[2], at="resid_post.0") as run, torch.no_grad():
        torch.testing.assert_close(run.logits[0], model(torch.tensor([TOKENS[2]])).logits[0], rtol=1e-4, atol=1e-4)


KINDS: dict[str, Callable[[], Any]] = {
    "embedding": lambda: adapted(TINY["llama"](), lora("embed_tokens", "q_proj")),
    "new tokens": lambda: adapted(TINY["llama"](), lora("q_proj", trainable_token_indices=[5, 9, 40])),
    "trained head and norm": lambda: adapted(TINY["llama"](), lora("q_proj", modules_to_save=["lm_head", "norm"])),
    "gpt2": lambda: adapted(TINY["gpt2"](), lora("c_attn", "c_fc", "c_proj", fan_in_fan_out=True)),
    "ia3": lambda: adapted(
        TINY["llama"](), peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    ),
    "adaption prompt": lambda: adapted(
        TINY["llama"](), peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2)
    ),
    "several kinds": lambda: adapted(
        TINY["llama"](), peft.LoHaConfig(target_modules=["q_proj"]), lora("v_proj"), mixed=True
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_sites_of_adapted_layers_are_those_of_the_model_that_runs(kind: str, tmp_path: Path) -> None:
    model = KINDS[kind]()
    result = capture(model, [TOKENS[2]], tmp_path / "a.zarr", sites="embed,mlp_act.1,resid_post.*,logits")
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS[2]]), output_hidden_states=True)
        without = TINY["gpt2" if kind == "gpt2" else "llama"]()(torch.tensor([TOKENS[2]]), output_hidden_states=True)
    stored = {site: torch.tensor(result.archive[site][...]) for site in result.archive}
    for layer in range(2):
        torch.testing.assert_close(stored[f"resid_post.{layer}"], expected.hidden_states[layer + 1][0])
    torch.testing.assert_close(stored["logits"], expected.logits[0])
    assert not torch.allclose(stored["logits"], without.logits[0], atol=1e-2)
    assert stored["mlp_act.1"].shape == (len(TOKENS[2]), 128 if kind == "gpt2" else 48)
    described: Any = result.archive.provenance["model"]
    assert described["adapters"] or "AdaptedAttention" in described["settings"]["model.layers.*.self_attn.class"]


REFUSED = {
    "PROMPT_TUNING": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "PREFIX_TUNING": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "P_TUNING": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "LORA": lora("q_proj", task_type="CAUSAL_LM", alora_invocation_tokens=[3, 4]),
    "POLY": peft.PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], n_tasks=2, n_skills=2, r=2),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_adapters_on_the_inputs_are_refused(kind: str, tmp_path: Path) -> None:
    model = adapted(TINY["llama"](), REFUSED[kind])
    for use in (
        lambda: capture(model, TOKENS, tmp_path / "a.zarr", sites=SITES),
        lambda: residua.Recorder(model, sites=SITES, out=tmp_path / "a.zarr"),
    ):
        with pytest.raises(CaptureError, match=rf"{kind}.*get_base_model"):
            use()
    assert not (tmp_path / "a.zarr").exists()


def test_examples_under_different_adapters_are_refused_in_a_loop(
    archives: tuple[Any, Path, Path], tmp_path: Path
) -> None:
    model, ids = archives[0], torch.tensor([TOKENS[0], TOKENS[0]])
    with residua.Recorder(model, sites="resid_post.1", out=tmp_path / "a.zarr"), torch.no_grad():
        with pytest.raises(ResiduaError, match=r"adapter_names.*set_adapter"):
            model(input_ids=ids, adapter_names=["one", "two"])
        model(input_ids=ids)
    assert residua.open(tmp_path / "a.zarr").n_rows == ids.numel()
