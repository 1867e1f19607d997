"""The reference model follows the model that it stands for, and is shared by models that are alike."""

from pathlib import Path
from unittest import mock

import torch
from torch import nn
from transformers import MixtralForCausalLM

from residua.capture.sites import reference_model as of_module
from residua.capture.sites.reference_model import reference_model, unsharded_shapes, unsharded_sites
from tests.models.tiny import TINY


def test_it_is_built_once_and_anew_when_the_model_changes() -> None:
    model = TINY["llama"]()
    first = reference_model(model)
    assert reference_model(model) is first
    assert unsharded_shapes(model)["lm_head.weight"] == (97, 32)
    model.resize_token_embeddings(120)
    assert unsharded_shapes(model)["lm_head.weight"] == (120, 32)
    nn.Module.to(model, torch.bfloat16)
    assert reference_model(model).dtype == torch.bfloat16


def test_models_share_it_if_class_config_and_dtype_are_the_same(tmp_path: Path) -> None:
    kinds = ("llama", "mistral", "qwen3", "gpt2", "mixtral")
    first = {name: reference_model(TINY[name]()) for name in kinds}
    assert len({id(reference) for reference in first.values()}) == len(kinds)
    assert reference_model(TINY["mixtral"]()) is first["mixtral"]
    TINY["mixtral"]().save_pretrained(tmp_path)
    loaded = MixtralForCausalLM.from_pretrained(tmp_path)
    assert reference_model(loaded) is first["mixtral"], "wherever its weights are from"
    again = reference_model(TINY["llama"]())
    assert again.state_dict().keys() == first["llama"].state_dict().keys()
    assert reference_model(TINY["llama"]().double()).dtype == torch.float64


def test_sites_are_measured_once_for_all_models_that_are_alike() -> None:
    wanted = ["resid_post.1,mlp_act.*", "module:model.layers.1.mlp@output"]
    with mock.patch.object(of_module, "may_be_distributed", return_value=True):
        model = TINY["qwen2"]()
        found = unsharded_sites(model, wanted)
        with mock.patch.object(of_module, "resolve_sites", side_effect=AssertionError("looked up again")):
            again = unsharded_sites(TINY["qwen2"](), wanted)
        assert again == found
        again.clear()
        assert unsharded_sites(model, wanted) == found, "the caller's dictionary is its own"
        model.resize_token_embeddings(120)
        assert unsharded_sites(model, "logits")["logits"].row_shape == (120,)
    assert found["module:model.layers.1.mlp@output"].row_shape == (32,)
    assert {name: info.row_shape for name, info in found.items() if "mlp_act" in name} == {
        f"mlp_act.{layer}": (48,) for layer in range(3)
    }
