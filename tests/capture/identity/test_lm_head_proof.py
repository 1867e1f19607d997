"""An LM head is kept if it gives the model's logits on a few tokens; otherwise the archive says why it has none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel

import residua
from residua.analysis.lens.lm_head import load_lm_head
from residua.capture.identity.lm_head import lm_head_problem
from residua.store.base.errors import AnalysisError
from tests.adapters import adapted, lora
from tests.models.tiny import TINY

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


class Scaled(nn.Linear):
    """An LM head whose forward does more than its weights say."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name
        return super().forward(input) * 0.25


def scaled(model: PreTrainedModel) -> None:
    head = Scaled(32, 97, bias=False)
    head.weight = model.get_submodule("lm_head").weight  # type: ignore[assignment]  # a parameter
    model.set_submodule("lm_head", head)


def hooked(model: PreTrainedModel) -> None:
    model.get_submodule("lm_head").register_forward_hook(lambda _m, _a, output: output + output.abs().max())


def with_adapter(model: PreTrainedModel) -> None:
    adapted(model, lora("lm_head"))


def with_trained_norm(model: PreTrainedModel) -> None:
    adapted(model, lora("q_proj", modules_to_save=["norm"]))


def with_tuned_norm(model: PreTrainedModel) -> None:
    adapted(model, peft.LNTuningConfig(target_modules=["norm"]))


def other_epsilon(model: PreTrainedModel) -> None:
    norm = model.get_submodule("model.norm")
    forward = norm.forward
    norm.forward = lambda hidden: forward(hidden) + 0.5


CHANGES: list[Callable[[PreTrainedModel], None]] = [
    scaled,
    hooked,
    with_adapter,
    with_trained_norm,
    with_tuned_norm,
    other_epsilon,
]


@pytest.mark.parametrize("name", TINY)
def test_heads_of_known_architectures_are_proved(name: str) -> None:
    assert lm_head_problem(TINY[name]()) == ""


@pytest.mark.parametrize("change", CHANGES)
def test_a_head_that_does_not_give_the_logits_is_not_kept(
    change: Callable[[PreTrainedModel], None], tmp_path: Path
) -> None:
    model = TINY["llama"]()
    change(model)
    found = residua.capture_dataset(model, [[3, 4, 5, 6]], out=tmp_path / "a.zarr", sites="resid_post.*")
    assert not (found.archive.path / "head" / "head.json").exists()
    (note,) = [note for note in found.notes if "LM head" in note]
    assert note in found.archive.provenance["notes"]  # type: ignore[operator]  # a list
    for read in (lambda: load_lm_head(found.archive.path / "head"), lambda: residua.TunedLens.fit(found.archive)):
        with pytest.raises(AnalysisError, match=r"a\.zarr.*has no LM head") as raised:
            read()
        assert note in str(raised.value)
        assert "damaged" not in str(raised.value)
    with residua.Recorder(model, sites="resid_post.*", out=tmp_path / "b.zarr"):
        model(input_ids=torch.tensor([[3, 4, 5]]))
    assert note in residua.open(tmp_path / "b.zarr").provenance["notes"]  # type: ignore[operator]  # a list


@pytest.mark.parametrize(
    ("activation", "has_head"), [("gelu_python", True), ("gelu_fast", True), ("swish", True), ("mish", False)]
)
def test_an_activation_of_another_name_is_no_reason_to_refuse(activation: str, has_head: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hf.BertForMaskedLM(hf.BertConfig(**SIZES, hidden_act=activation))
    nn.Module.train(model, False)
    found = residua.capture_dataset(model, [[3, 4, 5, 6]], out=tmp_path / "a.zarr", sites="final,logits")
    assert (found.archive.path / "head" / "head.json").exists() == has_head
    assert any(repr(activation) in note for note in found.notes) != has_head
    if has_head:
        head, final = load_lm_head(found.archive.path / "head"), torch.tensor(found.archive["final"][:])
        torch.testing.assert_close(head.logits(final), torch.tensor(found.archive["logits"][:]), rtol=1e-3, atol=1e-3)


def test_a_model_without_a_head_says_so() -> None:
    assert "LlamaModel" in lm_head_problem(TINY["llama"]().base_model)
    assert lm_head_problem(nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_heads_of_other_types_are_proved(dtype: torch.dtype) -> None:
    for name in ("llama", "gemma2", "bert", "opt-post-norm"):
        assert lm_head_problem(nn.Module.to(TINY[name](), dtype)) == ""
