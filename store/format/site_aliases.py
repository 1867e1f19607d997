"""Names that other libraries give to sites: hooks of TransformerLens, and paths of modules as in nnsight.

| also understood | is |
| --- | --- |
| `blocks.3.hook_resid_pre`, `..._mid`, `..._post`, `blocks.3.hook_in`, `blocks.3.hook_out` | `resid_pre.3`, ... |
| `blocks.3.hook_attn_out`, `blocks.3.attn.hook_out`; the same of the MLP | `attn_out.3`; `mlp_out.3` |
| `blocks.3.attn.hook_rot_q`, `..._rot_k`, `..._v`, `..._pattern`, `..._z` | `q.3`, `k.3`, `v.3`, ... |
| `blocks.3.mlp.hook_post` | `mlp_act.3` |
| `hook_embed`, `embed.hook_out`, `unembed.hook_out` | `embed`, `embed`, `logits` |
| `model.layers.3`, `transformer.h[3].output[0]` | `resid_post.3` |
| `model.layers.3.input` | `resid_pre.3` |
| `lm_head`, `lm_head.output` | `logits` |
| `model.layers[3].mlp.output[0]` | `module:model.layers.3.mlp@output` |

The number of a block may be ``*`` or a range, as in any pattern. TransformerLens's ``hook_q`` and ``hook_k`` are those
before rotary embedding, which no site is.
"""

import re
from difflib import get_close_matches
from typing import TypeVar

from residua.store.base.errors import UnknownSiteError, few

Value = TypeVar("Value")

_NUMBER = r"(?P<layer>\d{1,6}|\*|\d{1,6}-\d{1,6})"
_HOOKS = {
    "hook_resid_pre": "resid_pre",
    "hook_in": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_out": "resid_post",
    "hook_attn_out": "attn_out",
    "attn.hook_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_out": "mlp_out",
    "mlp.hook_post": "mlp_act",
    "attn.hook_rot_q": "q",
    "attn.hook_rot_k": "k",
    "attn.hook_v": "v",
    "attn.hook_pattern": "pattern",
    "attn.hook_z": "z",
}
_OF_MODEL = {
    "hook_embed": "embed",
    "embed.hook_out": "embed",
    "unembed.hook_out": "logits",
    "lm_head": "logits",
    "lm_head.output": "logits",
}
_BEFORE_ROTARY = {"attn.hook_q": "q", "attn.hook_k": "k"}
_HOOK = re.compile(rf"blocks\.{_NUMBER}\.(?P<hook>(?:[a-z0-9]+\.)*hook_\w+)")
_PREFIX = r"(?P<prefix>(?:(?:model|transformer|gpt_neox|language_model|base_model|bert|roberta|encoder)\.)*)"
_BLOCK = re.compile(
    rf"{_PREFIX}(?:layers|layer|h|blocks|block)(?:\.{_NUMBER}|\[(?P<inside>\d{{1,6}})\])(?P<rest>\.(?:output|input)s?)?"
    r"(?:\[0\])*"
)
_PATH = re.compile(r"[A-Za-z_]\w*(?:\.\w+|\[\d{1,6}\])*")
_MODULE = re.compile(rf"(?P<path>{_PATH.pattern})\.(?P<side>output|input)s?(?P<index>(?:\[\d{{1,3}}\])*)")
_STACKS = ("encoder.",)  # a path that begins so is the block of one stack of two


def canonical(word: str) -> str:
    """Return our name, or pattern, of what another library calls `word`; any other word as it is.

    Raises:
        UnknownSiteError: It is a hook of TransformerLens that is no site.

    Example:
        >>> canonical("blocks.3.hook_resid_post"), canonical("model.layers[3].output[0]"), canonical("final")
        ('resid_post.3', 'resid_post.3', 'final')
    """
    if word.startswith("module:"):
        return word
    if word in _OF_MODEL:
        return _OF_MODEL[word]
    if hook := _HOOK.fullmatch(word):
        return _of_hook(word, hook["hook"], hook["layer"])
    block = _BLOCK.fullmatch(word)
    if block and not block["prefix"].startswith(_STACKS):
        kind = "resid_pre" if (block["rest"] or "").startswith(".input") else "resid_post"
        return f"{kind}.{block['layer'] or block['inside']}"
    module = _MODULE.fullmatch(word)
    if module is None:
        return word
    items = [int(item) for item in re.findall(r"\d+", module["index"])]
    index = f".{items[0]}" if items and items[0] else ""  # the first item is what a site means unless told otherwise
    return f"module:{_dotted(module['path'])}@{module['side']}{index}"


def module_meant(word: str) -> str | None:
    """Return the site that a path of modules such as ``model.layers[3].mlp`` may mean; None if it is no such path.

    Example:
        >>> module_meant("model.layers[3].mlp")
        'module:model.layers.3.mlp@output'
    """
    path = _dotted(word)
    above, _, last = path.rpartition(".")
    is_path = _PATH.fullmatch(word) and above and ("." in above or not last.isdigit())
    return f"module:{path}@output" if is_path else None


def _dotted(path: str) -> str:
    return re.sub(r"\[(\d+)\]", r".\1", path)


def _of_hook(word: str, hook: str, layer: str) -> str:
    if hook in _HOOKS:
        return f"{_HOOKS[hook]}.{layer}"
    if hook in _BEFORE_ROTARY:
        kind = _BEFORE_ROTARY[hook]
        raise UnknownSiteError(
            f"{word!r} is before rotary embedding in TransformerLens, and no site is. '{kind}.{layer}' is after it, "
            f"like blocks.{layer}.attn.hook_rot_{kind} there; in a model without rotary embedding they are the same"
        )
    near = get_close_matches(hook, _HOOKS, n=1)
    meant = f" Did you mean blocks.{layer}.{near[0]}, which is '{_HOOKS[near[0]]}.{layer}'?" if near else ""
    raise UnknownSiteError(
        f"{word!r} is no site here.{meant} Of TransformerLens's hooks of a block, {', '.join(_HOOKS)} are understood, "
        f"as {', '.join(dict.fromkeys(_HOOKS.values()))}; any module can be named as module:PATH@output"
    )


class BySite(dict[str, Value]):
    """A dictionary whose keys are names of sites, and which takes what other libraries call a site for its name.

    It may have other keys beside them, such as ``row`` in a batch.

    Example:
        >>> BySite({"resid_post.3": 1.0})["blocks.3.hook_resid_post"]
        1.0
    """

    def __missing__(self, name: str) -> Value:
        """Look a name up as another library's.

        Raises:
            UnknownSiteError: It is none of a site that is there.
        """
        own = canonical(name) if isinstance(name, str) else name
        if own not in self:
            meant = "" if own == name else f", which is {own!r} here"
            raise UnknownSiteError(f"{name!r} was asked for{meant}, and there is only {few(list(self)) or 'nothing'}")
        return self[own]
