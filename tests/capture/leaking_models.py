"""Models whose rows padding changes, and a plain forward of one example to compare with."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from tests.models.tiny import _SIZES, LAYERS, VOCABULARY, _build


def _mobilebert() -> PreTrainedModel:
    """Build a model that shows each token its neighbours' embeddings; that of padding is zero until it is trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one of its layers has no weights at this size
        model = _build(hf.MobileBertForMaskedLM, hf.MobileBertConfig(**_SIZES, embedding_size=32))
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight[0] = torch.linspace(-1, 1, weight.shape[1])
    return model


class Averaged(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]  # transformers has no types here
    """Adds the mean over all positions, padding included, in every block."""

    config_class = hf.LlamaConfig

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        sizes: Any = config
        self.embed: nn.Module = nn.Embedding(sizes.vocab_size, sizes.hidden_size)
        self.layers = nn.ModuleList([nn.Linear(sizes.hidden_size, sizes.hidden_size) for _ in range(LAYERS)])
        self.lm_head: nn.Module = nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]  # transformers has no types here

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        hidden_BTD = self.embed(input_ids)
        for layer in self.layers:
            hidden_BTD = hidden_BTD + layer(hidden_BTD).tanh() + hidden_BTD.mean(1, keepdim=True)
        return CausalLMOutput(logits=self.lm_head(hidden_BTD))


LEAKING: dict[str, Callable[[], PreTrainedModel]] = {
    "fnet": lambda: _build(
        hf.FNetForMaskedLM,
        hf.FNetConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            max_position_embeddings=64,
            pad_token_id=0,
        ),
    ),
    "convbert": lambda: _build(hf.ConvBertForMaskedLM, hf.ConvBertConfig(**_SIZES, embedding_size=32)),
    "mobilebert": _mobilebert,
    "averaged": lambda: _build(Averaged, hf.LlamaConfig(**_SIZES)),
}


def module_values(model: PreTrainedModel, module: str, tokens: Sequence[int]) -> Tensor:
    """Return what a module gives for one example alone, by a plain hook, (positions, width)."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    handle = model.get_submodule(module).register_forward_hook(keep)
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([list(tokens)]), attention_mask=torch.ones((1, len(tokens)), dtype=torch.long))
    finally:
        handle.remove()
    return found[-1][0]
