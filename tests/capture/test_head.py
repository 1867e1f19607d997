"""What a capture leaves of the model's head, and for which models."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from residua.capture.head import save_head
from tests.capture.readings import everything
from tests.models import ODD, TINY


def test_the_parameters_are_the_models_own(tmp_path: Path) -> None:
    model = everything("phi", torch.bfloat16).model
    assert save_head(model, tmp_path / "head")
    stored, weights = load_file(tmp_path / "head" / "head.safetensors"), model.state_dict()
    origin = {
        "norm.weight": "model.final_layernorm.weight",
        "norm.bias": "model.final_layernorm.bias",
        "unembed.weight": "lm_head.weight",
        "unembed.bias": "lm_head.bias",
    }
    assert set(stored) == set(origin)
    assert all(torch.equal(stored[name], weights[path]) for name, path in origin.items())
    assert stored["norm.weight"].dtype == torch.bfloat16


def test_the_config_is_one_that_transformers_reads(tmp_path: Path) -> None:
    model = TINY["gemma2"]()
    save_head(model, tmp_path)
    assert type(model.config).from_pretrained(tmp_path).hidden_size == 32
    spec = json.loads((tmp_path / "head.json").read_text())
    assert (spec["norm"], spec["weight_offset"], spec["softcap"]) == ("rms", 1.0, 10.0)


@pytest.mark.parametrize("name", ODD)
def test_a_head_that_is_not_known_for_certain_is_not_written(name: str, tmp_path: Path) -> None:
    assert not save_head(ODD[name](), tmp_path)
    assert not save_head(TINY["llama"]().base_model, tmp_path)
    assert not save_head(torch.nn.Linear(2, 2), tmp_path)
    assert list(tmp_path.iterdir()) == []
