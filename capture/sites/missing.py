"""Why a canonical site is missing from a model, and what to use instead."""

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from torch import nn

from residua.capture.sites.anatomy import ATTENTION_KINDS, Anatomy, anatomy_of
from residua.store.format.site_names import LAYER_KINDS, MODEL_KINDS


def reasons(model: nn.Module, patterns: Iterable[str], available: Collection[str]) -> str:
    """Say for each canonical kind that the user named and the model lacks why that is so.

    Args:
        model: Any torch module.
        patterns: The user's words.
        available: Names of the sites that the model has.

    Returns:
        One sentence a kind, each with a space in front; empty if every kind named is there in full.
    """
    words = [word.strip().partition(".")[0] for text in patterns for word in text.split(",")]
    kinds = [kind for kind in (*LAYER_KINDS, *MODEL_KINDS) if any(fnmatchcase(kind, word) for word in words)]
    anatomy = anatomy_of(model)
    n_blocks = 0 if anatomy is None else len(anatomy.blocks)
    missing = [kind for kind in kinds if not _names(kind, n_blocks) <= set(available) or anatomy is None]
    return "".join(f" {kind}: {_reason(model, anatomy, kind)}." for kind in missing)


def _names(kind: str, n_blocks: int) -> set[str]:
    return {f"{kind}.{layer}" for layer in range(n_blocks)} if kind in LAYER_KINDS else {kind}


def _reason(model: nn.Module, anatomy: Anatomy | None, kind: str) -> str:
    name = type(model).__name__
    if anatomy is None:
        return f"{name} is no language model over token ids; use module:PATH@output for any of its modules"
    if kind == "logits":
        return f"{name} has no output embeddings; load it with its language modelling head"
    if anatomy.family is None:
        return _unknown_reason(anatomy, kind)
    if kind == "mlp_act":
        return (
            "a mixture of experts has hidden vectors only inside its experts, for the tokens routed to each; "
            f"use mlp_out, or module:{anatomy.blocks[0]}.mlp.gate@output for the router"
        )
    return f"{name} has none: {anatomy.family.lacks[kind]}"


def _unknown_reason(anatomy: Anatomy, kind: str) -> str:
    block = anatomy.blocks[0]
    example = next((name for name, _ in anatomy.model.get_submodule(block).named_children()), "")
    way_out = f"use module: sites, for example 'module:{block}.{example}@output'"
    if kind in ATTENTION_KINDS:
        return f"{type(anatomy.model).__name__} does not use transformers' attention interface; {way_out}"
    return (
        f"the architecture {anatomy.config.model_type!r} is not known; only what its blocks take and give, "
        f"and what passes through the attention interface, was found; {way_out}"
    )
