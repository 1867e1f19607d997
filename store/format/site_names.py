"""The names of sites: ``kind.layer`` on the command line, in Python and on disk.

There are four forms, and a stack may come before each but the last:

* ``resid_post.7``: a kind that every block has, and the number of the block;
* ``embed``, ``final``, ``logits``: a kind that a model has once;
* ``logits_top8.values`` and ``logits_top8.indices``: values and token ids of the eight largest logits;
* ``module:model.layers.3.mlp@output``: the input (``@input``) or output (``@output``, the default) of a module of the
  model, followed by ``.1`` for the second item of a tuple;
* ``encoder.resid_post.7``: the same of one of several stacks of blocks, each with tokens, frames or patches of its own.

A name that parses is safe as a folder name: its characters are letters, digits, ``_``, ``-``, ``.`` and ``@``, and
``..`` cannot occur. ``str(parse_site(text))`` is the canonical name. What TransformerLens and nnsight call sites is
understood too (`residua.store.format.site_aliases`).
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Literal

from residua.store.base.errors import UnknownSiteError
from residua.store.format.site_aliases import canonical, module_meant

STACKS = ("encoder", "decoder", "text", "vision")
"""Stacks of blocks that a name may begin with, in models that have several."""

CROSS_KINDS = ("cross_q", "cross_k", "cross_v", "cross_pattern", "cross_z", "cross_attn_out")
"""Kinds of a decoder's attention to the encoder's last rows, one site for each block."""

LAYER_KINDS = (
    "resid_pre",
    "kv_latent",
    "q",
    "k",
    "v",
    "pattern",
    "z",
    "attn_out",
    "mixer_out",
    "resid_mid",
    *CROSS_KINDS,
    "router_logits",
    "expert_index",
    "expert_weight",
    "mlp_act",
    "routed_out",
    "shared_out",
    "mlp_out",
    "resid_post",
)
"""Kinds with one site for each block, in the order in which a block computes them."""

MODEL_KINDS = ("embed", "final", "logits")
"""Kinds with one site for each model."""

_LONGEST = 200  # file systems allow 255 bytes a name
_TOP = re.compile(r"logits_top([1-9][0-9]{0,5})")
_LAYER = re.compile(r"0|[1-9][0-9]{0,5}")
_MODULE = re.compile(
    r"(?P<path>[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)"
    r"(?:@(?P<side>input|output)(?:\.(?P<index>0|[1-9][0-9]{0,2}))?)?"
)
_RANGE = re.compile(r"([a-z_]+(?:\.[a-z_]+)?)\.([0-9]{1,6})-([0-9]{1,6})")


@dataclass(frozen=True, kw_only=True)
class Site:
    """A named place in a model where one tensor can be read or replaced.

    Attributes:
        kind: One of ``LAYER_KINDS``, ``MODEL_KINDS``, ``logits_topK``, or ``module``.
        layer: Number of the block, for one of ``LAYER_KINDS``.
        field: ``values`` or ``indices``, for ``logits_topK``.
        module: Dotted path of the module, for ``module``.
        side: Whether the site is the module's input or its output, for ``module``.
        index: Index into a tuple, for ``module``; None means the tensor itself or the first item.
        stack: One of ``STACKS`` in a model that has several; never given for ``module``, whose path says it.
    """

    kind: str
    layer: int | None = None
    field: Literal["values", "indices"] | None = None
    module: str | None = None
    side: Literal["input", "output"] | None = None
    index: int | None = None
    stack: str = ""

    def __str__(self) -> str:
        if self.kind == "module":
            return f"module:{self._module_text}"
        suffix = self.field if self.layer is None else self.layer
        return ".".join(str(part) for part in (self.stack or None, self.kind, suffix) if part is not None)

    @property
    def path(self) -> str:
        """Node inside an archive, for example ``sites/resid_post/7``."""
        if self.kind == "module":
            return f"sites/module/{self._module_text}"
        return "sites/" + str(self).replace(".", "/")

    @property
    def row_stack(self) -> str:
        """The stack whose positions are the rows: the encoder's for `cross_k` and `cross_v`, else its own."""
        return "encoder" if self.kind in ("cross_k", "cross_v") else self.stack

    @property
    def is_pattern(self) -> bool:
        """Whether a row has one entry for each key: positions of its own example, or of the source."""
        return self.kind in ("pattern", "cross_pattern")

    @property
    def top(self) -> int | None:
        """Number of logits that ``logits_topK`` keeps; None for every other kind."""
        match = _TOP.fullmatch(self.kind)
        return int(match[1]) if match else None

    @property
    def _module_text(self) -> str:
        return f"{self.module}@{self.side}" + ("" if self.index is None else f".{self.index}")


@lru_cache(2**14)  # a model's sites are parsed by each of its batches, edits and selections
def parse_site(text: str) -> Site:
    """Parse the name of one site.

    Args:
        text: For example ``resid_post.7``, ``final`` or ``module:model.layers.3.mlp@output``.

    Returns:
        The site; its ``str`` is the canonical name.

    Raises:
        UnknownSiteError: The text does not name a site; the message says why.

    Example:
        >>> parse_site("resid_post.7").path
        'sites/resid_post/7'
        >>> str(parse_site("module:model.norm"))
        'module:model.norm@output'
    """
    if len(text) > _LONGEST:
        raise UnknownSiteError(f"Site {text[:40]!r}... has {len(text)} characters; at most {_LONGEST} are allowed.")
    text = canonical(text)
    if text.startswith("module:"):
        return _parse_module(text)
    stack, dot, inside = text.partition(".")
    if dot and stack in STACKS:
        return replace(_parse_own(text, inside), stack=stack)
    return _parse_own(text, text)


def _parse_own(text: str, inside: str) -> Site:
    """Parse what follows the stack in `text`."""
    kind, dot, suffix = inside.partition(".")
    if kind in LAYER_KINDS:
        return _parse_layer(text, kind, suffix)
    if _TOP.fullmatch(kind):
        return _parse_top(text, kind, suffix)
    if kind in MODEL_KINDS and not dot:
        return Site(kind=kind)
    if kind in MODEL_KINDS:
        raise UnknownSiteError(f"Site {text!r}: a model has {kind!r} only once; write just {kind!r}.")
    near = get_close_matches(kind, [*LAYER_KINDS, *MODEL_KINDS], n=3)
    if not near and (module := module_meant(text)):
        near = [module]
    raise UnknownSiteError(
        f"Site {text!r}: there is no kind {kind!r}. {_did_you_mean(near)}"
        f"The kinds are {', '.join([*LAYER_KINDS, *MODEL_KINDS])}, logits_topK for any K; "
        f"any module can be named as module:PATH@output. In a model of several stacks ({', '.join(STACKS)}) a name "
        "begins with one of them, as in 'encoder.resid_post.3'."
    )


def _parse_layer(text: str, kind: str, suffix: str) -> Site:
    if not _LAYER.fullmatch(suffix):
        raise UnknownSiteError(
            f"Site {text!r}: {kind!r} needs the number of one block after it, as in '{kind}.0'; "
            f"'{kind}.*' selects all of them where several sites can be given."
        )
    return Site(kind=kind, layer=int(suffix))


def _parse_top(text: str, kind: str, suffix: str) -> Site:
    if suffix == "values":
        return Site(kind=kind, field="values")
    if suffix == "indices":
        return Site(kind=kind, field="indices")
    raise UnknownSiteError(
        f"Site {text!r}: {kind!r} is stored as two sites, '{kind}.values' and '{kind}.indices'; name one."
    )


def _parse_module(text: str) -> Site:
    match = _MODULE.fullmatch(text.removeprefix("module:"))
    if match is None:
        raise UnknownSiteError(
            f"Site {text!r} does not have the form module:PATH@input or module:PATH@output, followed by .N for item N "
            "of a tuple. PATH is the dotted name from model.named_modules(), made of letters, digits, '_', '-' and '.'."
        )
    index = match["index"]
    return Site(
        kind="module",
        module=match["path"],
        side="input" if match["side"] == "input" else "output",
        index=None if index is None else int(index),
    )


def is_pattern(name: str) -> bool:
    """Return whether the site of this name is a pattern; see `Site.is_pattern`."""
    return "pattern." in name and parse_site(name).is_pattern


def select(patterns: str | Iterable[str], available: Iterable[str], *, on_demand: bool = True) -> tuple[str, ...]:
    """Return the names of the sites that patterns select, in the model's order and each once.

    A pattern is a site name, a name with ``*`` or ``?`` (``resid_post.*``, ``resid_*.3``), a range of blocks that
    includes both ends (``attn_out.0-5``), or ``logits_topK`` for its values and indices. One that names no stack
    selects in each stack: ``resid_post.*`` is ``encoder.resid_post.*`` and ``decoder.resid_post.*``.

    Args:
        patterns: Patterns separated by commas, or several such texts.
        available: Names of the existing sites, in the model's order.
        on_demand: Whether ``module:`` sites and ``logits_topK`` need not be in ``available``: true for a model, which
            makes them on demand; false for an archive.

    Returns:
        The selected names: those in ``available`` in its order, then those made on demand in the order of the patterns.

    Raises:
        UnknownSiteError: A pattern matches nothing; the message lists similar names.

    Example:
        >>> select("final,resid_post.*", ["resid_post.0", "resid_post.1", "final"])
        ('resid_post.0', 'resid_post.1', 'final')
    """
    known = tuple(available)
    texts = [patterns] if isinstance(patterns, str) else list(patterns)
    words = [word.strip() for text in texts for word in text.split(",") if word.strip()]
    if not words:
        raise UnknownSiteError("No site was named; name at least one, for example 'resid_post.*'.")
    wanted = {name: None for word in words for name in _expand_alias(word, known, on_demand)}
    return (*(name for name in known if name in wanted), *(name for name in wanted if name not in set(known)))


def _expand_alias(word: str, known: tuple[str, ...], on_demand: bool) -> list[str]:
    """Return the names that one pattern selects, which may be another library's name."""
    own = canonical(word)
    try:
        return _expand(own, known, on_demand)
    except UnknownSiteError as error:
        raise UnknownSiteError(str(error) if own == word else f"{word!r} is {own!r} here. {error}") from None


def _expand(word: str, known: tuple[str, ...], on_demand: bool) -> list[str]:
    """Return the names that one pattern selects."""
    if word.startswith("module:") or word.partition(".")[0] in STACKS:
        return _expand_in(word, known, on_demand)
    stacks = dict.fromkeys(stack for name in known if (stack := parse_site(name).stack))
    if not stacks or any(fnmatchcase(name, word) for name in known):
        return _expand_in(word, known, on_demand)
    found: list[str] = []
    for stack in stacks:
        own = tuple(name for name in known if name.startswith(f"{stack}."))
        with suppress(UnknownSiteError):  # another stack may have it
            found += _expand_in(f"{stack}.{word}", own, on_demand)
    return found or _refuse(word, known)


def _expand_in(word: str, known: tuple[str, ...], on_demand: bool) -> list[str]:
    """Return the names that one pattern selects, which names its stack if there are several."""
    if span := _RANGE.fullmatch(word):
        return _expand_range(word, span[1], int(span[2]), int(span[3]), known)
    if "*" in word or "?" in word:
        found = [name for name in known if fnmatchcase(name, word)]
        return found or _refuse(word, known)
    stack, _, kind = word.rpartition(".")
    if _TOP.fullmatch(kind) and stack in ("", *STACKS):
        return [n for field in ("values", "indices") for n in _expand_in(f"{word}.{field}", known, on_demand)]
    try:
        site = parse_site(word)
    except UnknownSiteError as error:
        return _refuse(word, known, reason=str(error))
    has_logits = str(replace(site, kind="logits", field=None)) in known
    made = on_demand and (site.kind == "module" or (site.top is not None and has_logits))
    return [str(site)] if made or str(site) in known else _refuse(word, known)


def _expand_range(word: str, kind: str, first: int, last: int, known: tuple[str, ...]) -> list[str]:
    layers = [parse_site(name).layer for name in known if name.startswith(f"{kind}.")]
    there = {layer for layer in layers if layer is not None}
    if first > last or not {first, last} <= there:
        return _refuse(word, known)
    return [f"{kind}.{layer}" for layer in range(first, last + 1) if layer in there]


def _refuse(word: str, known: tuple[str, ...], reason: str | None = None) -> list[str]:
    what = reason or f"There is no site {word!r}."
    near = get_close_matches(word, known, n=3)
    raise UnknownSiteError(
        f"{what} {_did_you_mean(near)}The sites are: {_summary(known) or 'none'}. Patterns are written like "
        "'resid_post.*', 'attn_out.3' or 'resid_post.0-5', separated by commas."
    )


def _summary(names: Iterable[str]) -> str:
    """List every kind once, with its blocks: ``embed, q.0-11``."""
    layers: dict[str, list[int]] = {}
    for name in names:
        site = parse_site(name)
        text = name if site.layer is None else name.rpartition(".")[0]
        layers.setdefault(text, []).extend([] if site.layer is None else [site.layer])
    return ", ".join(text + _range_text(sorted(found)) for text, found in layers.items())


def _range_text(layers: list[int]) -> str:
    if len(layers) < 2:
        return "".join(f".{layer}" for layer in layers)
    gap = "" if layers[-1] - layers[0] + 1 == len(layers) else " with gaps"
    return f".{layers[0]}-{layers[-1]}{gap}"


def _did_you_mean(near: list[str]) -> str:
    return f"Did you mean {' or '.join(near)}? " if near else ""
