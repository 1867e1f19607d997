"""Architectures: for each model family of transformers 5, the module where each kind of canonical site is read.

A `Family` names, with paths relative to a block, the module and whether its input or output is read. Kinds that are the
same in every family are not in it: ``resid_pre`` is a block's input, ``resid_post`` its output, ``final`` the last
block's output, ``embed`` the token embedding's output, ``logits`` the model's logits, and ``q``, ``k``, ``v``, ``z``
and ``pattern`` are read in transformers' attention interface.

``attn_out`` and ``mlp_out`` are what the block adds to the residual stream: in Gemma they follow the post norms. If a
dropout module lies between, its output is read; in evaluation mode dropout does nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from transformers import PreTrainedConfig

from residua.capture.runtime.compat import lacks_final_norm


@dataclass(frozen=True)
class Spot:
    """One side of one module.

    Attributes:
        module: Path relative to the block; empty for the block itself.
        side: ``output``; ``input``; or ``stream``, an input that is the residual stream itself, to which the block
            adds again later: a replacement is then written in place, to reach both uses.
        flat: Whether the tensor is (batch x positions, ...) instead of (batch, positions, ...).
    """

    module: str
    side: Literal["input", "output", "stream"] = "output"
    flat: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where the models of one family have their sites.

    Attributes:
        blocks: Path of the blocks, relative to the base model (``model.base_model``).
        final_norm: Path of the final norm, relative to the base model; None if there is none.
        kinds: For each kind where it is read, relative to a block.
        lacks: For each kind that the family lacks, the reason and what to use instead.
        norm_offset: What the final norm adds to its weight; 1 in Gemma.
        project_out: Path of a projection between final norm and unembedding, relative to the base model.
        transform: Path in the model of a dense layer with activation and norm before the unembedding.
    """

    blocks: str
    final_norm: str | None
    kinds: Mapping[str, Spot]
    lacks: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    norm_offset: float = 0.0
    project_out: str | None = None
    transform: str | None = None


_LLAMA = Family(
    blocks="layers",
    final_norm="norm",
    kinds={
        "attn_out": Spot("self_attn"),
        "resid_mid": Spot("post_attention_layernorm", "stream"),
        "mlp_act": Spot("mlp.down_proj", "input"),
        "mlp_out": Spot("mlp"),
    },
)
_GEMMA = replace(
    _LLAMA,
    norm_offset=1.0,
    kinds={
        "attn_out": Spot("post_attention_layernorm"),
        "resid_mid": Spot("pre_feedforward_layernorm", "stream"),
        "mlp_act": Spot("mlp.down_proj", "input"),
        "mlp_out": Spot("post_feedforward_layernorm"),
    },
)
_PHI3 = replace(
    _LLAMA,
    kinds={
        **_LLAMA.kinds,
        "attn_out": Spot("resid_attn_dropout"),
        "mlp_out": Spot("resid_mlp_dropout"),
    },
)
_GPT2 = Family(
    blocks="h",
    final_norm="ln_f",
    kinds={
        "attn_out": Spot("attn"),
        "resid_mid": Spot("ln_2", "stream"),
        "mlp_act": Spot("mlp.c_proj", "input"),
        "mlp_out": Spot("mlp"),
    },
)
SIDE_BY_SIDE = (
    "attention and MLP read the same residual stream side by side, so there is no stream between them; "
    "use resid_pre, attn_out and mlp_out"
)
"""Why such a block has no ``resid_mid``."""

_PARALLEL = {"resid_mid": SIDE_BY_SIDE}
_PHI = Family(
    blocks="layers",
    final_norm="final_layernorm",
    kinds={
        "attn_out": Spot("self_attn"),
        "mlp_act": Spot("mlp.fc2", "input"),
        "mlp_out": Spot("mlp"),
    },
    lacks=_PARALLEL,
)
_NEOX = Family(
    blocks="layers",
    final_norm="final_layer_norm",
    kinds={
        "attn_out": Spot("post_attention_dropout"),
        "mlp_act": Spot("mlp.dense_4h_to_h", "input"),
        "mlp_out": Spot("post_mlp_dropout"),
    },
    lacks=_PARALLEL,
)
_NEOX_SEQUENTIAL = replace(
    _NEOX, kinds={**_NEOX.kinds, "resid_mid": Spot("post_attention_layernorm", "stream")}, lacks={}
)
_OPT = Family(
    blocks="decoder.layers",
    final_norm="decoder.final_layer_norm",
    project_out="decoder.project_out",
    kinds={
        "attn_out": Spot("self_attn"),
        "resid_mid": Spot("final_layer_norm", "stream", flat=True),
        "mlp_act": Spot("fc2", "input", flat=True),
        "mlp_out": Spot("fc2", flat=True),
    },
)
_OPT_POST_NORM = replace(_OPT, final_norm=None, kinds={**_OPT.kinds, "resid_mid": Spot("self_attn_layer_norm")})
_BERT = Family(
    blocks="encoder.layer",
    final_norm=None,
    transform="cls.predictions.transform",
    kinds={
        "attn_out": Spot("attention.output.dropout"),
        "resid_mid": Spot("attention.output"),
        "mlp_act": Spot("output.dense", "input"),
        "mlp_out": Spot("output.dropout"),
    },
)


def _neox(config: PreTrainedConfig) -> Family:
    return _NEOX if config.use_parallel_residual else _NEOX_SEQUENTIAL


def _opt(config: PreTrainedConfig) -> Family:
    if not config.do_layer_norm_before:
        return _OPT_POST_NORM
    return replace(_OPT, final_norm=None) if lacks_final_norm(config) else _OPT


_FAMILIES: Mapping[str, Family | Callable[[PreTrainedConfig], Family]] = {
    "bert": _BERT,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": _GPT2,
    "gpt_neox": _neox,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "opt": _opt,
    "phi": _PHI,
    "phi3": _PHI3,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
}

KNOWN_MODEL_TYPES = tuple(sorted(_FAMILIES))
"""The ``config.model_type`` of every known architecture."""


def family_of(config: PreTrainedConfig) -> Family | None:
    """Return the family of a model with this config; None if its architecture is not known."""
    entry = _FAMILIES.get(config.model_type)
    return entry(config) if callable(entry) else entry
