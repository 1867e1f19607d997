"""The modules of one model that its canonical sites refer to: blocks, embedding, LM head; and their widths."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from inspect import signature

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

from residua.capture.runtime.wrappers import core_of, layer_inside, named_modules
from residua.capture.sites.architectures import Family, family_of

ATTENTION_KINDS = ("q", "k", "v", "z", "pattern")
"""Kinds that are read in transformers' attention interface."""

PIXELS = "pixel_values"
"""Name of the argument in which transformers' models take images."""

GRID = "grid_thw"
"""Name of the argument that tells frames, rows and columns of the patches of each image, where all are one sequence."""


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Where the modules of one model over tokens, or over the patches of images, are.

    Attributes:
        model: The model.
        config: The config of its text model.
        family: Where models of its family have their sites; None for an unknown architecture.
        blocks: Paths of the blocks in order.
        unembedding: Path of the LM head; None if the model has none.
        attention: Path of the module in each block whose attention `q`, `k`, `v`, `z` and `pattern` are, where a
            block computes another attention besides; empty where none does.
        cross: Path of the module in each block that attends to an encoder's rows, empty for a block without one; empty
            for a model that is no decoder of an encoder.
    """

    model: PreTrainedModel
    config: PreTrainedConfig
    family: Family | None
    blocks: tuple[str, ...]
    unembedding: str | None
    attention: tuple[str, ...] = ()
    cross: tuple[str, ...] = ()

    @cached_property
    def dtype(self) -> str:
        """Name of the dtype that the model computes in."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return int(self.config.num_attention_heads)

    @property
    def n_key_heads(self) -> int:
        """Number of key and value heads; fewer than query heads in grouped-query attention (Ainslie et al. 2023)."""
        return int(getattr(self.config, "num_key_value_heads", None) or self.n_heads)

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.n_heads)

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """The model's modules under the names that they have without wrappers."""
        return named_modules(self.model)

    def path(self, module: nn.Module | None) -> str | None:
        """Dotted path of one of the model's modules; None if it is not one."""
        return next((name for name, found in self.modules.items() if found is module), None)


def takes_choices(model: nn.Module) -> bool:
    """Return whether a model takes (examples, choices, tokens), as transformers' models for multiple choice do."""
    return type(core_of(model)).__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values()


def anatomy_of(model: nn.Module) -> Anatomy | None:
    """Find the modules of a model over token ids, or over the patches of images; None for any other model.

    Wrappers around the model and around modules in it are ignored (see `residua.capture.runtime.wrappers`). The blocks
    of an unknown architecture are looked for by their structure; `residua.capture.sites.discovery` proves by a run
    that a residual stream passes through them.
    """
    model = core_of(model)
    if not isinstance(model, PreTrainedModel) or (model.main_input_name != "input_ids" and not takes_pixels(model)):
        return None
    if getattr(model.config, "is_encoder_decoder", False) or takes_choices(model):
        return None
    config = model.config.get_text_config()
    modules = named_modules(model)
    family = family_of(model.config)
    if family is None:
        path = path_of_blocks(modules, config)
    else:
        base = next((name for name, module in modules.items() if module is model.base_model), "")
        path = f"{base}.{family.blocks}".lstrip(".")
    if path is None:
        return None
    lm_head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers has no annotations here
    return Anatomy(
        model=model,
        config=config,
        family=family,
        blocks=tuple(f"{path}.{name}" for name, _ in modules[path].named_children()),
        unembedding=next((name for name, module in modules.items() if module is lm_head), None),
    )


def takes_pixels(model: nn.Module) -> bool:
    """Return whether a model is one of transformers that reads images, or patches of them, and no tokens."""
    core = core_of(model)
    if not isinstance(core, PreTrainedModel) or getattr(core.config, "is_encoder_decoder", False):
        return False
    takes = signature(core.forward).parameters
    return (PIXELS in takes or GRID in takes) and "input_ids" not in takes


def n_logits_of(model: nn.Module) -> int | None:
    """Return the number of logits of a language model, which may be less than its vocabulary; None if not known."""
    anatomy = anatomy_of(model)
    if anatomy is None or anatomy.unembedding is None:
        return None
    found = getattr(layer_inside(anatomy.modules[anatomy.unembedding]), "out_features", None)
    return found if isinstance(found, int) else None


def path_of_blocks(modules: Mapping[str, nn.Module], config: PreTrainedConfig) -> str | None:
    """Return the path of the list of blocks of the text model; None if there is none.

    It is the outermost list of modules as long as the text config says, in the text model if that is a part of the
    whole: a vision tower may have the same depth. Some configs count their blocks under another name; then it is the
    outermost list of modules that transformers can checkpoint, which are blocks.
    """
    lists = {path: module for path, module in modules.items() if isinstance(module, nn.ModuleList) and len(module)}
    inside = [f"{path}." for path, module in modules.items() if path and getattr(module, "config", None) is config]
    of_text = {path: module for path, module in lists.items() if path.startswith(tuple(inside))}
    n_layers = getattr(config, "num_hidden_layers", None)
    for found in (of_text, lists):
        blocks = [path for path, module in found.items() if are_checkpointable(module)]
        as_told = [path for path, module in found.items() if len(module) == n_layers]
        for paths in ([path for path in as_told if path in blocks], as_told, blocks):
            if paths:
                return min(paths, key=lambda path: path.count("."))
    return None


def are_checkpointable(blocks: Iterable[nn.Module]) -> bool:
    """Return whether transformers can checkpoint each of these modules, as it can each block of its models."""
    return all(isinstance(core_of(block), GradientCheckpointingLayer) for block in blocks)
