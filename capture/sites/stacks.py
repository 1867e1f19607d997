"""Encoder and decoder of one model: each a stack of blocks with positions of its own, whose sites bear its name.

Each stack is looked at as a model of its own, and runs alone on a few tokens; a decoder gets numbers for the encoder's
last rows. What is found is then named by its place in the full model. A block of a decoder attends twice: once to
positions of its own, and once to the encoder's rows, which are another number of positions; so the lengths of keys tell
the two apart, and which positions a row belongs to.

Axes: `B` examples, `H` heads, `T` positions of the decoder, `S` positions of the source, `D` width of a head.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from residua.capture.hooks.attention import AttentionTap, eager_attention, intercepting
from residua.capture.hooks.site import SiteInfo
from residua.capture.runtime.devices import input_device
from residua.capture.runtime.wrappers import core_of, named_modules
from residua.capture.sites.anatomy import Anatomy, path_of_blocks
from residua.capture.sites.discovery import discover
from residua.capture.sites.part_sites import PART_KINDS
from residua.capture.sites.shape_probe import measure_sites, probes_of, run_on_tokens, run_probe, without_rows
from residua.store.base.errors import CaptureError
from residua.store.format.site_names import CROSS_KINDS, LAYER_KINDS, MODEL_KINDS, parse_site

_MORE_POSITIONS = 4  # of the source than of the decoder, in a run on a few tokens
PAIR_STACKS = ("encoder", "decoder")
"""The stacks of an encoder-decoder, in the order in which they run."""

_EMBEDS = tuple(f"{stack}.embed" for stack in PAIR_STACKS)
_ROWS = "encoder_hidden_states"
_READ = ("q", "k", "v", "z")


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One stack of a model that has several.

    Attributes:
        name: ``encoder`` or ``decoder``.
        module: The stack.
        path: Its dotted path in the model, without wrappers.
    """

    name: str
    module: PreTrainedModel
    path: str


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether a model is an encoder-decoder of transformers."""
    core = core_of(model)
    return isinstance(core, PreTrainedModel) and bool(getattr(core.config, "is_encoder_decoder", False))


def takes_pairs(model: nn.Module) -> bool:
    """Return whether a model is an encoder-decoder that reads token ids on both sides."""
    core = core_of(model)
    return is_encoder_decoder(core) and isinstance(core, PreTrainedModel) and core.main_input_name == "input_ids"


def stacks_of(model: nn.Module) -> tuple[Stack, ...]:
    """Return encoder and decoder of an encoder-decoder of transformers, if both are found; else nothing."""
    core = core_of(model)
    if not isinstance(core, PreTrainedModel) or not is_encoder_decoder(core):
        return ()
    paths = {id(core_of(module)): path for path, module in named_modules(core).items()}
    found: list[Stack] = []
    for name, get in zip(PAIR_STACKS, (core.get_encoder, core.get_decoder), strict=True):
        try:
            module: Any = core_of(get())  # type: ignore[no-untyped-call]  # transformers has no annotations here
            if found and any(part is found[0].module for part in module.modules()):  # Florence-2 gives the text model
                module = core_of(module.get_decoder())
        except (AttributeError, NotImplementedError):
            return ()
        if not isinstance(module, PreTrainedModel) or module is core or id(module) not in paths:
            return ()
        found.append(Stack(name=name, module=module, path=paths[id(module)]))
    return tuple(found) if found[0].module is not found[1].module else ()


def row_stack(info: SiteInfo, encoder: Stack) -> str:
    """Return the stack whose positions the rows of a site are; that of a module is where it lies."""
    if info.site.stack:
        return info.site.row_stack
    return "encoder" if f"{info.module}.".startswith(f"{encoder.path}.") else "decoder"


def find_in_stacks(model: nn.Module, stacks: Collection[Stack], kinds: Collection[str]) -> dict[str, SiteInfo]:
    """Find the sites of these kinds in encoder and decoder by running each on a few tokens.

    Args:
        model: The model, in its wrappers.
        stacks: Its stacks.
        kinds: Kinds of sites to look for; the others are left out.

    Returns:
        From name to site, such as ``decoder.cross_q.0``. One that the model lacks has a ``problem``.
    """
    found: dict[str, SiteInfo] = {}
    for stack in stacks:
        blocks = _blocks_of(stack)
        if not blocks:
            continue
        own = _in_decoder(stack, blocks, kinds) if stack.name == "decoder" else _in_encoder(stack, blocks, kinds)
        found |= {f"{stack.name}.{name}": _in_model(stack, info) for name, info in own.items()}
    if takes_pairs(model):
        found |= _not_embedded_there(model, {name: found[name] for name in _EMBEDS if name in found})
    if stacks and "logits" in kinds and (logits := _logits(model)) is not None:
        found[logits.name] = logits
    return found


def _not_embedded_there(model: nn.Module, sites: Mapping[str, SiteInfo]) -> dict[str, SiteInfo]:
    """Return those embeddings that a stack runs alone, and the full model does not: it embeds tokens by another module.

    The full model runs once on a few tokens. If it needs more than those, nothing is known.
    """
    asked = {name: info for name, info in sites.items() if not info.problem}
    modules, met = named_modules(core_of(model)), Counter[str]()
    handles = [
        modules[info.module].register_forward_hook(lambda *_, name=name: met.update([name]))
        for name, info in asked.items()
    ]
    try:
        ids = torch.ones((1, 2), dtype=torch.int64, device=input_device(model))
        run_on_tokens(model, (1, 2), decoder_input_ids=ids)
    except CaptureError:
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: without_rows(
            info, f"{info.module} does not run in the full model, which embeds these tokens by another module", n_met=0
        )
        for name, info in asked.items()
        if not met[name]
    }


def measure_in_stacks(stacks: Collection[Stack], sites: Mapping[str, SiteInfo]) -> dict[str, SiteInfo]:
    """Return those ``module:`` sites that lie in a stack, as a run of it on a few tokens shows them."""
    found: dict[str, SiteInfo] = {}
    for stack in stacks:
        within = f"{stack.path}."
        own = {
            name: replace(info, module=info.module.removeprefix(within))
            for name, info in sites.items()
            if info.module.startswith(within)
        }
        if not own:
            continue
        with suppress(CaptureError), _given_source(stack.module):  # the calls of the user's loop may show more
            measured = measure_sites(stack.module, own)
            found |= {name: replace(info, module=sites[name].module) for name, info in measured.items()}
    return found


def _in_model(stack: Stack, info: SiteInfo) -> SiteInfo:
    """Return a site of a stack by its place in the full model."""
    named = info.inside(stack.path, f"{stack.name}.{info.name}")
    if info.flat and not info.problem and stack.name == "decoder":
        reason = f"{info.where} has examples and positions as one axis, which is not understood in a decoder"
        return without_rows(named, reason, n_met=info.n_met)
    return named


def _in_encoder(stack: Stack, blocks: tuple[str, ...], kinds: Collection[str]) -> dict[str, SiteInfo]:
    return discover(stack.module, _anatomy(stack, blocks), kinds)


def _blocks_of(stack: Stack) -> tuple[str, ...]:
    """Return the paths of a stack's blocks in the stack; none if they are not found."""
    modules = named_modules(stack.module)
    path = path_of_blocks(modules, stack.module.config)
    return () if path is None else tuple(f"{path}.{name}" for name, _ in modules[path].named_children())


def anatomies_in_stacks(model: nn.Module) -> dict[str, Anatomy]:
    """Return, by stack, the anatomy of an encoder-decoder whose blocks are those of the stack; empty for other models.

    Paths are those of the full model.
    """
    core = core_of(model)
    found = {}
    for stack in stacks_of(model):
        blocks = tuple(f"{stack.path}.{block}" for block in _blocks_of(stack))
        if blocks and isinstance(core, PreTrainedModel):
            found[stack.name] = replace(_anatomy(stack, blocks), model=core)
    return found


def _anatomy(
    stack: Stack, blocks: tuple[str, ...], attention: tuple[str, ...] = (), cross: tuple[str, ...] = ()
) -> Anatomy:
    return Anatomy(
        model=stack.module,
        config=stack.module.config,
        family=None,
        blocks=blocks,
        unembedding=None,
        attention=attention,
        cross=cross,
    )


def _in_decoder(stack: Stack, blocks: tuple[str, ...], kinds: Collection[str]) -> dict[str, SiteInfo]:
    """Return the sites of a decoder, block by block in the order in which it computes them."""
    with _given_source(stack.module):
        try:
            runs = _watched(stack.module, blocks)
        except CaptureError as error:
            runs = {block: str(error) for block in blocks}
        attention = tuple(block if isinstance(run, str) else run.own for block, run in runs.items())
        others = tuple("" if isinstance(run, str) else run.cross for run in runs.values())
        found = discover(stack.module, _anatomy(stack, blocks, attention, others), kinds)
        found |= _not_told_apart(blocks, others, found)
        cross = _cross_sites(stack.module, runs, [kind for kind in CROSS_KINDS if kind in kinds])
    layers = [f"{kind}.{layer}" for layer in range(len(blocks)) for kind in LAYER_KINDS]
    every = found | cross
    return {name: every[name] for name in (MODEL_KINDS[0], *layers, *MODEL_KINDS[1:]) if name in every}


def _not_told_apart(blocks: Sequence[str], cross: Sequence[str], found: Mapping[str, SiteInfo]) -> dict[str, SiteInfo]:
    """Return the parts of the blocks whose attention to the source is not known: it would be taken for another part."""
    unknown = [layer for layer, path in enumerate(cross) if not path]
    names = [f"{kind}.{layer}" for layer in unknown for kind in PART_KINDS]
    return {
        name: without_rows(
            found[name],
            f"{blocks[found[name].site.layer or 0]} attends to the source in its own code, and which of the "
            "parts that it adds is which is not told apart",
        )
        for name in names
        if name in found
    }


@contextmanager
def _given_source(decoder: PreTrainedModel) -> Iterator[None]:
    """Give a decoder that runs by itself numbers for the encoder's last rows: more positions than it has itself."""
    if _ROWS not in signature(decoder.forward).parameters:
        yield
        return
    config = decoder.config.get_text_config()
    width = int(getattr(config, "cross_attention_hidden_size", None) or config.hidden_size)

    def give(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tokens = kwargs.get("input_ids")
        if not isinstance(tokens, Tensor) or kwargs.get(_ROWS) is not None:
            return None
        n_examples, n_positions = tokens.shape
        shape = (n_examples, n_positions + _MORE_POSITIONS, width)
        rows = torch.sin(torch.arange(shape[0] * shape[1] * shape[2]).float()).view(shape)
        return args, {**kwargs, _ROWS: rows.to(input_device(decoder), decoder.dtype)}

    handle = decoder.register_forward_pre_hook(give, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class _Attention(AttentionTap):
    """The shapes of what one module's attention got and gave, one entry for each call."""

    kinds: frozenset[str] = frozenset(_READ)
    shapes: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    dtype: str = ""

    def __call__(self, kind: str, tensor: Tensor) -> None:
        self.shapes.setdefault(kind, []).append(tuple(tensor.shape))
        self.dtype = str(tensor.dtype).removeprefix("torch.")

    def n_keys(self) -> list[int]:
        """Return the number of keys of each call."""
        return [shape[2] for shape in self.shapes.get("k", ())]


@dataclass(frozen=True, kw_only=True)
class _BlockAttention:
    """Which module of a decoder's block attends to its own positions, and which to the source; empty if none does."""

    own: str
    cross: str
    rows: Mapping[str, tuple[int, ...]]
    dtype: str


def _watched(decoder: PreTrainedModel, blocks: tuple[str, ...]) -> dict[str, "_BlockAttention | str"]:
    """Run a decoder twice, and return the two attentions of each block, or why they are not known."""
    modules, probes = named_modules(decoder), probes_of(decoder)
    taps = {path: _Attention() for path in modules}
    with intercepting({modules[path]: tap for path, tap in taps.items()}):
        for probe in probes:
            run_probe(decoder, probe)
    return {block: _two_of(block, taps, [positions for _, positions in probes]) for block in blocks}


def _two_of(block: str, taps: Mapping[str, _Attention], lengths: list[int]) -> "_BlockAttention | str":
    inside = {path: tap for path, tap in taps.items() if f"{path}.".startswith(f"{block}.") and tap.shapes}
    sources = [length + _MORE_POSITIONS for length in lengths]
    own = [path for path, tap in inside.items() if tap.n_keys() == lengths]
    cross = [path for path, tap in inside.items() if tap.n_keys() == sources]
    if len(own) > 1 or len(cross) > 1:
        return f"{block} computes attention several times, in {', '.join([*own, *cross])}"
    tap = inside[cross[0]] if cross else _Attention()
    rows = {kind: shapes[0] for kind, shapes in tap.shapes.items()}
    return _BlockAttention(own="".join(own) or block, cross="".join(cross), rows=rows, dtype=tap.dtype)


def _cross_sites(
    decoder: PreTrainedModel, runs: Mapping[str, "_BlockAttention | str"], kinds: Collection[str]
) -> dict[str, SiteInfo]:
    pattern_problem = _pattern_problem(decoder) if "cross_pattern" in kinds else ""
    return {
        f"{kind}.{layer}": _cross_site(f"{kind}.{layer}", block, run, pattern_problem)
        for layer, (block, run) in enumerate(runs.items())
        for kind in kinds
        if kind != "cross_attn_out"
    }


def _pattern_problem(decoder: PreTrainedModel) -> str:
    try:
        with eager_attention(decoder):
            return ""
    except CaptureError as error:
        return str(error)


def _cross_site(name: str, block: str, run: "_BlockAttention | str", pattern_problem: str) -> SiteInfo:
    info = SiteInfo(name=name, row_shape=None, dtype=None, module=block, via="attention")
    kind = parse_site(name).kind
    if isinstance(run, str):
        return without_rows(info, run)
    if not run.cross:
        reason = f"{block} attends to no encoder's rows through transformers' attention interface"
        return without_rows(info, reason, n_met=0)
    if kind == "cross_pattern" and pattern_problem:
        return without_rows(info, pattern_problem)
    place = replace(info, module=run.cross, dtype=run.dtype, n_met=1)
    if kind == "cross_pattern":
        return replace(place, row_shape=(run.rows["q"][1], None))
    read = kind.removeprefix("cross_")
    shape = run.rows[read]  # z is (B, T, H, D), the others (B, H, T, D)
    return replace(place, row_shape=shape[2:] if read == "z" else (shape[1], shape[3]))


def _logits(model: nn.Module) -> SiteInfo | None:
    core = core_of(model)
    if not isinstance(core, PreTrainedModel):
        return None
    lm_head: Any = core.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers has no annotations here
    width = getattr(lm_head, "out_features", None)
    if not isinstance(width, int):
        return None
    dtype = str(core.dtype).removeprefix("torch.")
    return SiteInfo(name="decoder.logits", row_shape=(width,), dtype=dtype, module="", via="logits")
