"""Vision tower and text model of one model: each has a row space of its own, and its sites bear its name.

A vision-language model has a tower inside, whose rows are patches, while its own rows are tokens. CLIP and its like
have a text model and a tower side by side, and no rows of their own. A tower runs alone on pixels, and gives what it
gives inside the model. A model over images is its own tower, and one over tokens its own text model.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from residua.capture.runtime.wrappers import core_of, named_modules
from residua.capture.sites.anatomy import takes_pixels

NAMES = ("vision", "text")
_IMAGE_TOKENS = ("image_token_id", "image_token_index")


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A part of a model with a row space of its own.

    Attributes:
        name: ``vision`` or ``text``.
        module: The part, which runs alone; the model itself if its rows are these.
        path: Its dotted path in the model, without wrappers; empty for the model itself.
    """

    name: str
    module: PreTrainedModel
    path: str


def towers_of(model: nn.Module) -> dict[str, Tower]:
    """Return the vision tower and the text model of a model of transformers, as far as it has them, by name."""
    core = core_of(model)
    if not isinstance(core, PreTrainedModel) or getattr(core.config, "is_encoder_decoder", False):
        return {}
    if takes_pixels(core):
        return {"vision": Tower(name="vision", module=core, path="")}
    parts = [
        (path, module)
        for path, wrapped in named_modules(core).items()
        if path and isinstance(module := core_of(wrapped), PreTrainedModel)
    ]
    vision = next((Tower(name="vision", module=m, path=path) for path, m in parts if takes_pixels(m)), None)
    text: Tower | None = Tower(name="text", module=core, path="")
    if vision is not None and has_towers_only(core):
        texts = (m for m in parts if m[1].config is core.config.get_text_config() and not takes_pixels(m[1]))
        text = next((Tower(name="text", module=module, path=path) for path, module in texts), None)
    return {tower.name: tower for tower in (vision, text) if tower is not None}


def has_towers_only(model: nn.Module) -> bool:
    """Return whether a model compares a text with an image, as CLIP does: it puts no patches among its tokens.

    A model that predicts tokens has rows of tokens, also where its config does not say which token stands for a patch.
    """
    core = core_of(model)
    if not isinstance(core, PreTrainedModel) or takes_pixels(core):
        return False
    config = core.config
    is_dual = hasattr(config, "text_config") and hasattr(config, "vision_config")
    predicts_tokens = core.get_output_embeddings() is not None  # type: ignore[no-untyped-call]  # as in transformers
    return is_dual and image_token_of(core) is None and not predicts_tokens


def image_token_of(model: nn.Module) -> int | None:
    """Return the token that stands for a patch in a vision-language model; None if its config does not say."""
    config = getattr(core_of(model), "config", None)
    found = (getattr(config, name, None) for name in _IMAGE_TOKENS)
    return next((number for number in found if isinstance(number, int)), None)
