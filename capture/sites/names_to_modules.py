"""From a site's name to a module of the model: which sites a model has, and which sites the user's patterns name.

`model_sites` lists the canonical sites of a model with their row shapes, and `resolve_sites` turns patterns into sites.
It adds sites that exist on demand (``module:`` sites and ``logits_topK``), and says why a site is missing.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from residua.capture.blocks.experts import EXPERT_KINDS, is_of_experts
from residua.capture.hooks.site import SiteInfo, Via
from residua.capture.runtime.wrappers import core_of, first_name, layer_inside, named_modules
from residua.capture.sites.anatomy import (
    ATTENTION_KINDS,
    Anatomy,
    anatomy_of,
    path_of_blocks,
    takes_choices,
    takes_pixels,
)
from residua.capture.sites.discovery import discover
from residua.capture.sites.pixels import runs_alone
from residua.capture.sites.shape_probe import measure_sites, takes_tokens, without_rows
from residua.capture.sites.stacks import Stack, find_in_stacks, is_encoder_decoder, measure_in_stacks, stacks_of
from residua.capture.sites.towers import NAMES, Tower, has_towers_only, towers_of
from residua.store.base.errors import CaptureError, UnknownSiteError
from residua.store.format.site_aliases import canonical
from residua.store.format.site_names import CROSS_KINDS, LAYER_KINDS, MODEL_KINDS, STACKS, Site, parse_site, select


def model_sites(model: nn.Module) -> dict[str, SiteInfo]:
    """List the canonical sites of a model, in the order in which it computes them.

    Row shapes of a known architecture follow from its config and its modules. In an unknown architecture, sites are
    found by running the model on a few tokens, each for itself (see `residua.capture.sites.discovery`).

    Args:
        model: Any torch module; only a transformers model over token ids or images has canonical sites.

    Returns:
        From name to site: ``embed``, then block by block, then ``final`` and ``logits``.
    """
    return _with_rows(_looked_for(model, (*LAYER_KINDS, *MODEL_KINDS)))


def resolve_sites(model: nn.Module, patterns: str | Iterable[str]) -> dict[str, SiteInfo]:
    """Turn the user's patterns into sites of this model.

    Args:
        model: Any torch module.
        patterns: As for `residua.store.format.site_names.select`.

    Returns:
        From name to site: canonical sites in the model's order, then the others in the order of their names in
        `patterns`. A ``module:`` site that has no row for each token or example of a run on a few tokens says why in
        its ``problem``; if the model takes no token ids, it is not measured.

    Raises:
        UnknownSiteError: A pattern matches no site of this model; the message says why, and what to use instead.
        CaptureError: A module has no tensor where a ``module:`` site is to be read.
    """
    texts = [patterns] if isinstance(patterns, str) else list(patterns)
    words = [canonical(word.strip()) for text in texts for word in text.split(",")]
    towers = _named_towers(model, words)
    if towers:
        return _in_towers(words, towers)
    looked_for = _looked_for(model, _kinds_in(words))
    available = _with_rows(looked_for)
    try:
        names = select(words, available)
    except UnknownSiteError:
        looked_for = _looked_for(model, (*LAYER_KINDS, *MODEL_KINDS))
        available = _with_rows(looked_for)
        try:
            names = select(words, available)
        except UnknownSiteError as error:
            raise UnknownSiteError(f"{error}{_reasons(model, words, looked_for)}") from None
    sites = {name: available.get(name) or _on_demand(model, name, available) for name in names}
    unmeasured = {name: info for name, info in sites.items() if info.row_shape is None}
    if unmeasured and takes_tokens(model):
        sites |= _measured_for_themselves(model, unmeasured)
    elif unmeasured:
        sites |= measure_in_stacks(stacks_of(model), unmeasured)
    if not any(info.site.kind == "module" for info in sites.values()):
        return sites
    modules = named_modules(model)
    return {name: _refused_in_experts(modules, info) for name, info in sites.items()}


def _named_towers(model: nn.Module, words: Sequence[str]) -> list[Tower]:
    """Return the towers that patterns name; nothing if they name none, and mean the model itself.

    Raises:
        UnknownSiteError: The model lacks such a tower, or some patterns name one and others do not.
    """
    every = [word.strip() for text in words for word in text.split(",") if word.strip()]
    heads = [word.partition(".")[0] for word in every]
    asked = [name for name in NAMES if name in heads]
    is_of_modules = all(word.startswith("module:") for word in every)
    known = towers_of(model) if asked or (has_towers_only(model) and not is_of_modules) else {}
    if not known and (not asked or stacks_of(model)):  # then the stacks say what there is
        return []
    name = type(core_of(model)).__name__
    first = f"{next(iter(known), NAMES[0])}.{next((word for word in every if word.partition('.')[0] not in NAMES), '')}"
    if any(head not in NAMES for head in heads):
        raise UnknownSiteError(
            f"{', '.join(every)}: {name} has {' and '.join(known)}, which have rows of their own: begin each site with "
            f"one of these, as in {first!r}"
        )
    missing = [each for each in asked if each not in known]
    if missing:
        raise UnknownSiteError(
            f"{', '.join(every)}: {name} has no part of transformers that is its {missing[0]} model and runs alone; "
            "use module: sites"
        )
    return [known[each] for each in asked]


def _in_towers(words: Sequence[str], towers: Sequence[Tower]) -> dict[str, SiteInfo]:
    """Return the sites of towers, under their names and by their places in the full model."""
    every = [word.strip() for text in words for word in text.split(",") if word.strip()]
    found: dict[str, SiteInfo] = {}
    for tower in towers:
        own = [word.partition(".")[2] for word in every if word.startswith(f"{tower.name}.")]
        try:
            of_tower = resolve_sites(tower.module, own)
        except UnknownSiteError as error:
            said = str(error).replace("'module:", f"'module:{tower.path}." if tower.path else "'module:")
            asked = ", ".join(f"{tower.name}.{word}" for word in own)
            place = tower.path or "the model itself"
            raise UnknownSiteError(
                f"{asked}: in {place}, where names have no {tower.name!r} before them: {said}"
            ) from None
        for info in of_tower.values():
            name = f"{tower.name}.{info.name}"
            inside = info.inside(tower.path, name)
            if tower.path and tower.name == "vision" and (info.flat or runs_alone(tower.module)):
                inside = replace(inside, flat=False, per_token=False)  # a call of the model may have several images
            found[name] = inside
    return found


def _refused_in_experts(modules: Mapping[str, nn.Module], info: SiteInfo) -> SiteInfo:
    """Return a site, without rows if it is inside a module of experts: what row is which token is not known there."""
    experts = _experts_around(modules, info.module) if info.site.kind == "module" else None
    return info if experts is None else without_rows(info, _in_experts(experts), n_met=info.n_met)


def _experts_around(modules: Mapping[str, nn.Module], path: str) -> str | None:
    """Return the path of the module of experts around another module; None if there is none."""
    while path := path.rpartition(".")[0]:
        if path in modules and is_of_experts(modules[path]):
            return path
    return None


def _in_experts(experts: str) -> str:
    return (
        f"{experts} holds the weights of all its experts, and tensors inside it have a row for each token of each "
        "expert, in an order of their own: choose expert_index, expert_weight and the input of that module, from which "
        "the activations of an expert can be computed."
    )


def _looked_for(model: nn.Module, kinds: Collection[str]) -> dict[str, SiteInfo]:
    """Return the canonical sites of these kinds; those that an unknown architecture lacks have a ``problem``."""
    anatomy = anatomy_of(model) if kinds else None
    if anatomy is None:
        return _without_anatomy(model, kinds) if kinds else {}
    if anatomy.family is None:
        return discover(model, anatomy, kinds)
    of_experts = [kind for kind in EXPERT_KINDS if kind in kinds]
    mixtures = discover(model, anatomy, of_experts) if of_experts and _has_experts(anatomy) else {}
    sites = [_embed(anatomy)]
    for layer in range(len(anatomy.blocks)):
        sites += [mixtures.get(f"{kind}.{layer}") or _in_block(anatomy, kind, layer) for kind in LAYER_KINDS]
    sites += [_final(anatomy), _logits(anatomy)]
    return {info.name: info for info in sites if info is not None and info.site.kind in kinds}


def _without_anatomy(model: nn.Module, kinds: Collection[str]) -> dict[str, SiteInfo]:
    """Return the sites of encoder and decoder, or what a model over tokens has beside blocks: embedding and logits."""
    core = core_of(model)
    if isinstance(core, PreTrainedModel) and takes_tokens(core) and not takes_choices(core):
        return discover(model, Anatomy(model=core, config=core.config, family=None, blocks=(), unembedding=None), kinds)
    return find_in_stacks(model, stacks_of(model), kinds)


def _has_experts(anatomy: Anatomy) -> bool:
    return any(is_of_experts(module) for path in anatomy.blocks for module in anatomy.modules[path].modules())


def _with_rows(sites: Mapping[str, SiteInfo]) -> dict[str, SiteInfo]:
    return {name: info for name, info in sites.items() if not info.problem}


def _kinds_in(patterns: Iterable[str]) -> list[str]:
    """Return the kinds of canonical sites that patterns may select: none for ``module:`` sites."""
    words = [word.strip() for text in patterns for word in text.split(",")]
    own = [word.removeprefix(f"{stack}.") for word in words for stack in [word.partition(".")[0]] if stack in STACKS]
    own += [word for word in words if word.partition(".")[0] not in STACKS]
    heads = [word.partition(".")[0] for word in own if not word.startswith("module:")]
    kinds = [kind for kind in (*LAYER_KINDS, *MODEL_KINDS) if any(fnmatchcase(kind, head) for head in heads)]
    return [*kinds, "logits"] if any(head.startswith("logits_top") for head in heads) else kinds


def _measured_for_themselves(model: nn.Module, sites: Mapping[str, SiteInfo]) -> dict[str, SiteInfo]:
    """Measure ``module:`` sites; what a run on tokens alone cannot show is left to the calls of the user's loop."""
    try:
        return measure_sites(model, sites)
    except CaptureError as error:
        return {name: without_rows(info, str(error), n_met=0) for name, info in sites.items()}


def _embed(anatomy: Anatomy) -> SiteInfo | None:
    path = anatomy.path(anatomy.model.get_input_embeddings())
    if path is None:
        return None
    return _info(anatomy, "embed", (_attribute(anatomy.modules[path], "embedding_dim"),), module=path)


def _final(anatomy: Anatomy) -> SiteInfo:
    return _info(anatomy, "final", (int(anatomy.config.hidden_size),), module=anatomy.blocks[-1])


def _logits(anatomy: Anatomy) -> SiteInfo | None:
    lm_head: nn.Module | None = anatomy.model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers has no annotations here
    if lm_head is None:
        return None
    return _info(anatomy, "logits", (_attribute(lm_head, "out_features"),), module="", via="logits")


def _in_block(anatomy: Anatomy, kind: str, layer: int) -> SiteInfo | None:
    name, block = f"{kind}.{layer}", anatomy.blocks[layer]
    if kind in ATTENTION_KINDS:
        return _info(anatomy, name, _head_row(anatomy, kind), module=block, via="attention")
    if kind in ("resid_pre", "resid_post"):
        stream = (int(anatomy.config.hidden_size),)
        return _info(anatomy, name, stream, module=block, via="input" if kind == "resid_pre" else "output")
    return _from_family(anatomy, kind, layer)


def _from_family(anatomy: Anatomy, kind: str, layer: int) -> SiteInfo | None:
    spot = anatomy.family.kinds.get(kind) if anatomy.family else None
    if spot is None:
        return None
    path = f"{anatomy.blocks[layer]}.{spot.module}"
    module = anatomy.modules.get(path)
    if module is None:  # a mixture of experts has no module for the down projection
        return None
    width = _input_width(module) if kind == "mlp_act" else int(anatomy.config.hidden_size)
    return _info(anatomy, f"{kind}.{layer}", (width,), module=path, via=spot.side, flat=spot.flat)


def _input_width(projection: nn.Module) -> int:
    """Return the input width of a projection; transformers' Conv1D calls it nx."""
    return _attribute(projection, "in_features" if hasattr(layer_inside(projection), "in_features") else "nx")


def _attribute(module: nn.Module, name: str) -> int:
    width = getattr(layer_inside(module), name)
    if not isinstance(width, int):
        raise TypeError(f"{type(module).__name__}.{name} is {width!r}, not a width")
    return width


def _head_row(anatomy: Anatomy, kind: str) -> tuple[int | None, ...]:
    if kind == "pattern":
        return (anatomy.n_heads, None)
    n_heads = anatomy.n_key_heads if kind in ("k", "v") else anatomy.n_heads
    return (n_heads, anatomy.head_width)


def _info(
    anatomy: Anatomy,
    name: str,
    row_shape: tuple[int | None, ...],
    *,
    module: str,
    via: Via = "output",
    flat: bool = False,
) -> SiteInfo:
    return SiteInfo(name=name, row_shape=row_shape, dtype=anatomy.dtype, module=module, via=via, flat=flat)


def _on_demand(model: nn.Module, name: str, available: dict[str, SiteInfo]) -> SiteInfo:
    """Return a site that exists on demand: of any module, or of the largest logits."""
    site = parse_site(name)
    if site.top is not None:
        return _top_logits(site, available[str(replace(site, kind="logits", field=None))])
    path = str(site.module)
    module = first_name(model, path) or first_name(model, path.removeprefix("model."))  # nnsight's name of the model
    if not module:
        paths = [path for path in named_modules(model) if path]
        near = get_close_matches(str(site.module), paths, n=3)
        experts = _experts_around(named_modules(model), str(site.module))
        raise UnknownSiteError(
            f"Site {name!r}: {type(model).__name__} has no module {site.module!r}. "
            + (f"{_in_experts(experts)} " if experts else "")
            + (f"Did you mean {' or '.join(near)}? " if near else "")
            + "Use a name of model.named_modules()."
        )
    return SiteInfo(
        name=name,
        row_shape=None,
        dtype=None,
        module=module,
        via=site.side or "output",
        index=site.index,
        per_token=False,
    )


def _top_logits(site: Site, logits: SiteInfo) -> SiteInfo:
    n_logits = (logits.row_shape or (0,))[0] or 0
    if site.top is None or site.top > n_logits:
        raise UnknownSiteError(
            f"Site {str(site)!r} asks for {site.top} logits, and the model has {n_logits}: ask for fewer."
        )
    dtype = "int32" if site.field == "indices" else logits.dtype
    return replace(logits, name=str(site), row_shape=(site.top,), dtype=dtype)


def _reasons(model: nn.Module, patterns: Iterable[str], looked_for: Mapping[str, SiteInfo]) -> str:
    """Return why the model lacks canonical sites that the user named, and what to use instead.

    The result is one sentence for each kind, with a leading space; empty if the model has every site of the kinds.
    """
    anatomy = anatomy_of(model)
    if anatomy is None and stacks_of(model):
        return _reasons_in_stacks(model, patterns, looked_for)
    n_blocks = 0 if anatomy is None else len(anatomy.blocks)
    words = [word.strip() for text in patterns for word in text.split(",")]
    lost = [name for name, info in looked_for.items() if info.problem]
    lost.sort(key=lambda name: not any(fnmatchcase(name, word) for word in words))  # what was asked for first
    problems = {name: looked_for[name].problem for name in lost}
    missing = [
        kind
        for kind in _kinds_in(words)
        if anatomy is None or not _names(kind, n_blocks) <= set(looked_for) - set(problems)
    ]
    return _each_once({kind: _reason(model, anatomy, kind, problems) for kind in missing})


def _each_once(reasons: Mapping[str, str]) -> str:
    """Return one sentence for each reason, with a leading space: that of the first of the kinds it holds for."""
    alike: dict[str, list[str]] = {}
    for kind, reason in reasons.items():
        alike.setdefault(reason.replace(f"{kind.rpartition('.')[2]}.", "KIND."), []).append(kind)
    return "".join(f" {', '.join(kinds)}: {reasons[kinds[0]]}." for kinds in alike.values())


def _reasons_in_stacks(model: nn.Module, patterns: Iterable[str], looked_for: Mapping[str, SiteInfo]) -> str:
    """Return for each kind that was asked for what was found of it in the stacks of blocks that were named."""
    words = [word.strip() for text in patterns for word in text.split(",")]
    kinds = _kinds_in(words)
    heads = {word.partition(".")[0] for word in words}
    stacks = [stack for stack in stacks_of(model) if stack.name in heads or not heads & set(STACKS)]
    core = core_of(model)
    name = getattr(getattr(core, "config", None), "model_type", type(core).__name__)
    lines = []
    for stack in stacks:
        infos = [info for info in looked_for.values() if info.site.stack == stack.name and info.site.kind in kinds]
        remedy = f"use module: sites, for example 'module:{_first_block(stack)}@output'"
        if not infos:
            lines.append(f" {stack.name}: the {stack.name} of {name!r} has none of these; {remedy}.")
        lacking: dict[str, SiteInfo] = {}
        for info in sorted(infos, key=lambda info: info.name not in words):  # what was asked for first
            if info.problem:
                lacking.setdefault(info.site.kind, info)
        lines.append(
            _each_once(
                {
                    f"{stack.name}.{kind}": f"{info.name} of {name!r}: {info.problem.rstrip('.')}; {remedy}"
                    for kind, info in lacking.items()
                }
            )
        )
    return "".join(lines)


def _first_block(stack: Stack) -> str:
    """Return the path of a stack's first block in the model; its own path if no list of blocks is found in it."""
    modules = named_modules(stack.module)
    blocks = path_of_blocks(modules, stack.module.config)
    children = [] if blocks is None else [f"{blocks}.{name}" for name, _ in modules[blocks].named_children()]
    return ".".join((stack.path, *children[:1]))


def _names(kind: str, n_blocks: int) -> set[str]:
    return {f"{kind}.{layer}" for layer in range(n_blocks)} if kind in LAYER_KINDS else {kind}


def _without_blocks(model: nn.Module) -> str:
    name = type(model).__name__
    if takes_choices(model):
        return (
            f"{name} takes (examples, choices, tokens), so a token is of no one example; load the same weights with "
            "AutoModel, or as a classifier of sequences"
        )
    core = core_of(model)
    remedy = f"use module: sites, for example 'module:{_some_module(core)}@output'"
    if is_encoder_decoder(model):
        return f"the encoder and the decoder of {name} are no models of transformers that run alone; {remedy}"
    if isinstance(core, PreTrainedModel) and core.main_input_name != "input_ids" and not takes_pixels(core):
        return (
            f"{name} takes {core.main_input_name!r}, and only models over token ids, over the patches of images or "
            f"over pairs have sites by name; {remedy}"
        )
    return (
        f"{name} has no list of blocks that run one after another, each once, so no residual stream is known in it; "
        f"{remedy}"
    )


def _some_module(model: nn.Module) -> str:
    """Return the path of the first member of the outermost list of modules, or else of any module."""
    modules = named_modules(model)
    lists = [path for path, module in modules.items() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        return next((path for path in modules if path), "PATH")
    return _first_that_runs(modules, min(lists, key=lambda path: path.count(".")))


def _first_that_runs(modules: Mapping[str, nn.Module], path: str) -> str:
    """Return a module, or the first in it if it is a list of modules, which does not run itself."""
    while isinstance(found := modules[path], nn.ModuleList) and len(found):
        path = f"{path}.0"
    return path


def _reason(model: nn.Module, anatomy: Anatomy | None, kind: str, problems: Mapping[str, str]) -> str:
    name = type(model).__name__
    if anatomy is None:
        return _without_blocks(model)
    if kind == "logits" and kind not in problems:
        return f"{name} has no output embeddings; load it with its language modelling head"
    if anatomy.family is None:
        return _unknown_reason(anatomy, {site: why for site, why in problems.items() if site.partition(".")[0] == kind})
    if kind in EXPERT_KINDS:
        of_kind = {site: why for site, why in problems.items() if site.partition(".")[0] == kind}
        return _unknown_reason(anatomy, of_kind) if of_kind else f"{name} has no mixture of experts; use mlp_out"
    if kind == "mlp_act":
        return (
            f"{name} lacks it: a mixture of experts has hidden activations only inside its experts, for the tokens "
            "routed to each; use mlp_out, or router_logits, expert_index and expert_weight for the routing"
        )
    if kind == "kv_latent":
        return f"{name} has none: its keys and values are made of the residual stream itself; use k and v"
    if kind == "mixer_out":
        return f"{name} has none: its blocks have no sequence mixer other than attention; use attn_out"
    return f"{name} has none: {_IN_NO_FAMILY.get(kind) or anatomy.family.lacks[kind]}"


_IN_NO_FAMILY = {
    "kv_latent": "its keys and values are made of the residual stream itself; use k and v",
    "mixer_out": "its blocks have no sequence mixer other than attention; use attn_out",
    **dict.fromkeys(CROSS_KINDS, "it has no encoder beside its blocks"),
}
"""Why the models of the table lack kinds of sites that none of them has."""


def _unknown_reason(anatomy: Anatomy, problems: Mapping[str, str]) -> str:
    """Return what was found about a kind in an unknown architecture: each reason once, with the blocks it holds for."""
    block = anatomy.blocks[0]
    inside = [f"{block}.{name}" for name, _ in anatomy.modules[block].named_children()]
    example = _first_that_runs(anatomy.modules, next(iter(inside), block))
    remedy = f"use module: sites, for example 'module:{example}@output'"
    if not problems:
        return f"{type(anatomy.model).__name__} ({anatomy.config.model_type}) has none; {remedy}"
    name, problem = next(iter(problems.items()))
    others = f" (the same or similar for {len(problems) - 1} other blocks)" if len(problems) > 1 else ""
    return f"{name} of {anatomy.config.model_type!r}: {problem.rstrip('.')}{others}; {remedy}"
