"""Which model this is, beyond its weights: hooks, attributes and activations of the user's."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import residua
from residua.store.base.errors import PlanError
from tests.models.tiny import TINY
from tests.pipelines.small_capture import capture, make_tokens
from tests.stopped import take_back

Change = Callable[[PreTrainedModel], Any]
SITES = "resid_post.*"


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
    "hook": (hook, r"layers\.\*\.hooks.*test_which_model"),
    "scale": (set_scaling, r"self_attn\.scaling"),
    "epsilon": (set_epsilon, r"variance_epsilon.*0\.001"),
    "activation": (set_activation, r"act_fn\.class.*GELU"),
    "window": (set_window, r"sliding_window"),
    "forward": (replace_forward, r"mlp\.hooks: .*forward"),
}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An unfinished archive and a sealed one of a tiny Llama."""
    folder = tmp_path_factory.mktemp("llama")
    capture(TINY["llama"](), make_tokens(), folder / "whole.zarr", sites=SITES)
    shutil.copytree(folder / "whole.zarr", folder / "stopped.zarr")
    take_back(folder / "stopped.zarr", 2, 3)
    return folder / "stopped.zarr", folder / "whole.zarr"


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_changed_model_is_refused_and_the_change_named(name: str, archives: tuple[Path, Path]) -> None:
    change, named = CHANGES[name]
    model, (stopped, whole) = TINY["llama"](), archives
    change(model)
    with pytest.raises(PlanError, match=named):
        capture(model, make_tokens(), stopped, sites=SITES)
    with pytest.raises(PlanError, match=named), residua.replay(model, whole, examples=[0], at="resid_post.0"):
        pass
    with residua.replay(model, whole, examples=[0], at="resid_post.0", force=True) as run:
        assert any("force" in note for note in run.notes)


def test_a_change_that_is_taken_back_is_none(archives: tuple[Path, Path], tmp_path: Path) -> None:
    model, tokens = TINY["llama"](), make_tokens()
    shutil.copytree(archives[0], tmp_path / "a.zarr")
    hook(model).remove()
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
