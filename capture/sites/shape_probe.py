"""Shape probing: measure the row shapes and dtypes of sites by running the model on a few tokens or images.

The model runs twice, on batches that differ in the number of examples and, of tokens, in that of positions, so that
each axis of a site's tensor shows what it counts. Each site is measured for itself: one that has no rows keeps the
reason, and bars no other.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from inspect import signature

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from residua.capture.hooks.attention import eager_attention
from residua.capture.hooks.forward_call import probing, run_on_few
from residua.capture.hooks.hooks import attached, values_of
from residua.capture.hooks.site import SiteInfo
from residua.capture.runtime.devices import input_device
from residua.capture.runtime.wrappers import core_of, named_modules
from residua.capture.sites.anatomy import anatomy_of, takes_pixels
from residua.capture.sites.frames import n_frame_positions, run_on_frames, takes_frames
from residua.capture.sites.pixels import few_images, image_probes, moves_patches, run_on_images, runs_alone
from residua.store.base.errors import CaptureError

PROBES = ((2, 3), (5, 7))
"""(examples, positions) of the two runs on tokens: all numbers and products differ."""

_EXAMPLES = (2, 3)  # of frames


def takes_tokens(model: nn.Module) -> bool:
    """Return whether a model is one that reads token ids; it may need other inputs too, such as images."""
    core = core_of(model)
    if not isinstance(core, PreTrainedModel) or core.main_input_name != "input_ids" or takes_pixels(core):
        return False
    return not getattr(core.config, "is_encoder_decoder", False)


def probes_of(model: nn.Module) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (examples, positions) of the two runs of a model on a few tokens, images or examples of frames.

    Raises:
        CaptureError: The model takes images, and has not one position for each patch.
    """
    if takes_frames(model):
        return (_EXAMPLES[0], n_frame_positions(model)), (_EXAMPLES[1], n_frame_positions(model))
    return image_probes(model) if takes_pixels(model) else PROBES


def run_probe(model: nn.Module, probe: tuple[int, int]) -> Tensor | None:
    """Run a model on the tokens, images or frames of one of `probes_of`; see `run_on_tokens`."""
    if takes_frames(model):
        return run_on_frames(model, probe[0])
    if not takes_pixels(model):
        return run_on_tokens(model, probe)
    larger = runs_alone(model) and probe == image_probes(model)[1]
    return run_on_images(model, few_images(model, probe[0], larger=larger))


def run_on_tokens(model: nn.Module, shape: tuple[int, int], **options: Tensor) -> Tensor | None:
    """Run a model on a few tokens without padding, without gradients and in evaluation mode.

    Args:
        model: The model.
        shape: (examples, positions).
        options: Other arguments of its forward.

    Returns:
        Its logits or last hidden state; None if it gives neither.

    Raises:
        CaptureError: The model cannot run on tokens alone.
    """
    core = _language_model(model)
    ids = _ordinary_tokens(core.config, shape[0] * shape[1]).to(input_device(model)).view(shape)
    kwargs: dict[str, Tensor | bool] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **options}
    if "use_cache" in signature(core.forward).parameters:
        kwargs["use_cache"] = False
    return run_on_few(model, kwargs, f"{shape[0]} examples of {shape[1]} tokens")


def _language_model(model: nn.Module) -> PreTrainedModel:
    core = core_of(model)
    if not isinstance(core, PreTrainedModel):
        raise CaptureError(f"{type(core).__name__} is no transformers model, and cannot be run on tokens")
    return core


def _ordinary_tokens(config: PreTrainedConfig, n: int) -> Tensor:
    """Return token ids that differ and that the config gives no meaning, as it does to the place of an image."""
    configs = [config, config.get_text_config()]
    special = {
        number
        for each in configs
        for name, value in vars(each).items()
        if name.endswith(("token_id", "token_index", "token_ids"))
        for number in (value if isinstance(value, list) else [value])
    }
    vocabulary = int(getattr(configs[1], "vocab_size", 0) or n + 8)
    ids = [number for number in range(min(vocabulary, n + len(special) + 8)) if number not in special][-n:] or [0]
    return torch.tensor([ids[i % len(ids)] for i in range(n)])


def measure_sites(
    model: nn.Module, sites: Mapping[str, SiteInfo], watching: AbstractContextManager[object] | None = None
) -> dict[str, SiteInfo]:
    """Run a model on a few tokens, and return its sites with the row shapes and dtypes that were measured.

    Args:
        model: A transformers model that takes ``input_ids`` or images. If a pattern is among the sites, it runs with
            eager attention.
        sites: The sites to measure.
        watching: Entered around the second run, to see more of it.

    Returns:
        The same sites with the measured ``row_shape``, ``dtype``, ``per_token``, ``flat`` and ``n_met``; a site that
        has no rows says why in ``problem``.

    Raises:
        CaptureError: The model cannot run on tokens, or on images, alone.
    """
    found = _measured(model, sites, watching)
    twice = [name for name, info in found.items() if info.n_met == _PAIR and info.site.kind in ("v", "z")]
    if twice:
        pairs = _measured(model, {name: replace(sites[name], is_pair=True) for name in twice})
        found |= {name: info for name, info in pairs.items() if not info.problem}
    return _without_other_order(model, found) if takes_pixels(model) and moves_patches(model) else found


_PAIR = 2  # calls of differential attention


def _measured(
    model: nn.Module, sites: Mapping[str, SiteInfo], watching: AbstractContextManager[object] | None = None
) -> dict[str, SiteInfo]:
    """Run a model twice on a few tokens; see `measure_sites`."""
    problems: dict[str, str] = {}
    probes = probes_of(model)
    with probing(), _eager_for_patterns(model, sites, problems):
        first = _run_once(model, sites, probes[0], problems)
        with watching or nullcontext():
            second = _run_once(model, sites, probes[1], problems)
    return {
        name: without_rows(info, problems[name])
        if name in problems
        else _from_runs(info, first[name], second[name], probes)
        for name, info in sites.items()
    }


def _without_other_order(model: nn.Module, sites: Mapping[str, SiteInfo]) -> dict[str, SiteInfo]:
    """Return sites, those outside the blocks without rows: patches lie in another order there than in the blocks."""
    anatomy = anatomy_of(model)
    blocks = () if anatomy is None else tuple(f"{path}." for path in anatomy.blocks)
    problem = (
        f"{type(core_of(model)).__name__} has its patches in another order outside its blocks, so which row is which"
    )
    return {
        name: info
        if info.problem or f"{info.module}.".startswith(blocks)
        else without_rows(info, f"{problem} patch is not known: choose a site of a block", n_met=info.n_met)
        for name, info in sites.items()
    }


@contextmanager
def _eager_for_patterns(model: nn.Module, sites: Mapping[str, SiteInfo], problems: dict[str, str]) -> Iterator[None]:
    """Switch to eager attention if a pattern is among the sites; where that cannot be, patterns have a problem."""
    patterns = [name for name, info in sites.items() if info.site.kind == "pattern"]
    with ExitStack() as stack:
        if patterns:
            try:
                stack.enter_context(eager_attention(_language_model(model)))
            except CaptureError as error:
                problems.update(dict.fromkeys(patterns, str(error)))
        yield


def _run_once(
    model: nn.Module, sites: Mapping[str, SiteInfo], shape: tuple[int, int], problems: dict[str, str]
) -> dict[str, list[Tensor]]:
    """Run once; return meta tensors for each site, with the axes that the module's tensor has."""
    seen: dict[str, list[Tensor]] = {name: [] for name in sites}

    def note(info: SiteInfo, tensor: Tensor) -> None:
        seen[info.name].append(tensor.to("meta"))

    def note_problem(info: SiteInfo, error: CaptureError) -> None:
        problems.setdefault(info.name, str(error))

    plain = [replace(info, flat=False, streams=False) for name, info in sites.items() if name not in problems]
    with attached(named_modules(model), plain, values_of(note), on_problem=note_problem):
        run_probe(model, shape)
    return seen


def _from_runs(
    info: SiteInfo, first: list[Tensor], second: list[Tensor], probes: tuple[tuple[int, int], tuple[int, int]]
) -> SiteInfo:
    n_met = max(len(first), len(second))
    if (len(first), len(second)) != (1, 1):
        return without_rows(info, not_once(info, n_met), n_met=n_met)
    shapes = (tuple(first[0].shape), tuple(second[0].shape))
    flat = all(s[:1] == (b * t,) for s, (b, t) in zip(shapes, probes, strict=True))
    per_token = flat or all(s[:2] == probe for s, probe in zip(shapes, probes, strict=True))
    streams = not per_token and all(s[1:3] == probe for s, probe in zip(shapes, probes, strict=True))
    if streams and shapes[0][0] == shapes[1][0]:  # Gemma 3n carries several residual streams
        shapes = (_streams_last(shapes[0]), _streams_last(shapes[1]))
        per_token = True
    elif not per_token and not all(s[:1] == (b,) for s, (b, _) in zip(shapes, probes, strict=True)):
        return without_rows(
            info,
            f"Site {info.name!r} has shape {shapes[0]} for {probes[0]} (examples, positions) and {shapes[1]} for "
            f"{probes[1]}: which axes are examples and positions is not clear. Choose a site of shape (batch, "
            "positions, ...).",
            n_met=1,
        )
    if info.site.kind == "pattern" and any(s[-1] != t for s, (_, t) in zip(shapes, probes, strict=True)):
        keys = f"{shapes[0][-1]} keys for {probes[0][1]} tokens"
        return without_rows(info, f"Site {info.name!r} has {keys}, so which key is which token is not clear.", n_met=1)
    start = 1 if flat or not per_token else 2
    row = tuple(a if a == b else None for a, b in zip(shapes[0][start:], shapes[1][start:], strict=True))
    if info.site.kind == "pattern":
        row = (*row[:-1], None)
    dtype = str(first[0].dtype).removeprefix("torch.")
    return replace(
        info, row_shape=row, dtype=dtype, per_token=per_token, flat=flat, streams=streams and per_token, n_met=1
    )


def _streams_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[1:3], shape[0], *shape[3:])


def without_rows(info: SiteInfo, problem: str, *, n_met: int | None = None) -> SiteInfo:
    """Return a site that has no rows, and the reason."""
    return replace(info, row_shape=None, dtype=None, per_token=False, problem=problem, n_met=n_met)


def not_once(info: SiteInfo, n_times: int) -> str:
    """Return the message for a site that a forward call did not compute exactly once."""
    if info.via == "attention" and n_times == 0:
        return (
            f"Site {info.name!r} was not met: {info.module} computes no attention through transformers' attention "
            "interface; it has none, or computes it by itself, and then has no q, k, v, z or pattern. Use module: "
            f"sites, for example 'module:{info.module}@output' or the projections in it."
        )
    if info.via == "attention":
        return (
            f"Site {info.name!r} was met {n_times} times in one forward call instead of once: {info.module} computes "
            "attention several times, each time from other values. Use q, k and pattern where they are offered, or "
            f"module: sites, for example 'module:{info.module}@output' or the projections in it."
        )
    if n_times == 0:
        return (
            f"Site {info.name!r} ({info.where}) was met 0 times in one forward call instead of once: the module does "
            "not run, or the model calls its forward directly, where nothing reads it. Name a module that each forward "
            "call runs exactly once, and call the full model."
        )
    return (
        f"Site {info.name!r} ({info.where}) was met {n_times} times in one forward call instead of once. "
        "Name a module that each forward call runs exactly once, and call the full model."
    )
