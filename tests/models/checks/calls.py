"""What is checked of a model that needs more than tokens: its sites in one call, against what the model itself gives.

The call has one example. The sites of each stack of blocks (encoder and decoder; the only one of a vision model) are
read by `residua.tap`, and held against hidden states, attention weights, identities and the modules' own values.
"""

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import residua
from residua.capture.sites.names_to_modules import resolve_sites
from residua.capture.sites.towers import has_towers_only
from residua.store.format.site_names import STACKS
from tests.models.checks.language import Checks, note_reasons
from tests.models.checks.truth import ModuleLog, eager, is_same
from tests.models.findings import Record, StackRecord

_LARGE = frozenset(
    {"swinv2", "segformer", "pvt", "glpn", "levit", "hiera", "efficientnet", "convnext", "convnextv2", "bit"}
    | {"mobilevit", "mobilenet_v1", "mobilenet_v2", "resnet", "regnet", "poolformer", "focalnet", "swiftformer"}
    | {"dinov3_convnext"}
)
_VIDEO = frozenset(("timesformer", "vivit", "videomae", "videoprism_vision_model"))


_OWN_CALLS: dict[str, Callable[[Any, Tensor, Tensor], dict[str, Tensor]]] = {
    "idefics": lambda _model, tokens, pixels: {
        "input_ids": tokens,
        "pixel_values": pixels[None],
        "image_attention_mask": torch.ones(*tokens.shape, 1, dtype=torch.long),
    },
    "kosmos-2": lambda model, tokens, pixels: {
        "input_ids": torch.cat([tokens[:, :1].expand(1, model.config.latent_query_num), tokens], 1),
        "pixel_values": pixels,
        "image_embeds_position_mask": torch.arange(model.config.latent_query_num + tokens.shape[1])[None]
        < model.config.latent_query_num,
    },
    "blip-2": lambda model, tokens, pixels: {"input_ids": _queries(model, tokens), "pixel_values": pixels},
    "instructblip": lambda model, tokens, pixels: {
        "input_ids": _queries(model, tokens),
        "pixel_values": pixels,
        "qformer_input_ids": tokens,
    },
    "udop": lambda _model, tokens, _pixels: {
        "input_ids": tokens,
        "bbox": torch.zeros(*tokens.shape, 4),
        "decoder_input_ids": tokens[:, 3:10],
    },
    "pix2struct": lambda model, tokens, pixels: {
        "flattened_patches": pixels.flatten()[: 3 * (model.encoder.embeddings.patch_projection.in_features + 2)]
        .view(1, 3, -1)
        .abs(),
        "decoder_input_ids": tokens[:, 3:10],
    },
    "pp_formulanet": lambda _model, tokens, pixels: {"pixel_values": pixels, "decoder_input_ids": tokens[:, 3:10]},
    "vision-encoder-decoder": lambda model, tokens, pixels: {
        "pixel_values": pixels.repeat(1, 1, *[model.config.encoder.image_size // 32] * 2),
        "decoder_input_ids": tokens[:, 3:10],
    },
}
"""Types that are not called with tokens or images alone, and the arguments of a call, given tokens and pixels."""


def has_own_call(key: str) -> bool:
    """Return whether a type is checked in calls with more inputs than tokens."""
    return key in _OWN_CALLS


def _queries(model: Any, tokens: Tensor) -> Tensor:
    """Return tokens after those that stand for an image."""
    return torch.cat([torch.full((1, model.config.num_query_tokens), model.config.image_token_index), tokens], 1)


def call_of(model: PreTrainedModel, key: str) -> dict[str, Tensor]:
    """Return the arguments of a call of one example."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(8, 90, (1, 13), generator=generator)
    if key in _OWN_CALLS:
        return _OWN_CALLS[key](model, tokens, torch.randn(1, 3, 32, 32, generator=generator))
    if model.main_input_name == "input_ids" and model.config.is_encoder_decoder:
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "decoder_input_ids": tokens[:, 3:10]}
    named = {"moonshine": "input_values", "clip": "pixel_values", "siglip": "pixel_values", "siglip2": "pixel_values"}
    name = named.get(key, model.main_input_name)
    shapes: dict[str, tuple[int, ...]] = {
        "input_values": (1, 1024, 128) if key == "audio-spectrogram-transformer" else (1, 3200),
        "input_features": {
            "whisper": (1, 80, 48),
            "wav2vec2-bert": (1, 64, 160),
            "lasr_ctc": (1, 64, 128),
        }.get(key, (1, 64, 80)),
    }
    side = 256 if key == "mobilevitv2" else 64 if key == "swin2sr" else 224 if key in _LARGE else 32
    shapes["pixel_values"] = (1, 4, 3, 32, 32) if key in _VIDEO else (1, 3, side, side)
    shapes["pixel_values_videos"] = (1, 4, 3, 32, 32)
    if name not in shapes:
        raise ValueError(f"the sweep has no inputs for {name}")
    call = {name: torch.randn(shapes[name], generator=generator)}
    if "input_ids" in signature(model.forward).parameters and not model.config.is_encoder_decoder:
        call["input_ids"] = tokens[:, :7]
    if key == "siglip2":  # its images are cut into patches before
        call["pixel_values"] = torch.randn(1, 16, 192, generator=generator)
        call |= {"pixel_attention_mask": torch.ones(1, 16), "spatial_shapes": torch.tensor([[4, 4]])}
    if key in ("whisper", "speech_to_text", "moonshine"):
        call["decoder_input_ids"] = tokens[:, 3:10]
    if key == "vit_mae":
        call["noise"] = torch.arange(16.0)[None]  # each call would shuffle anew
    return call


def check_calls(model: PreTrainedModel, record: Record) -> None:
    """Check the sites of each stack, and ``module:`` sites where there are no others."""
    call = call_of(model, record.key)
    log = ModuleLog(model)
    with log.watching(), torch.no_grad():
        output = model(**call, output_hidden_states=True)
    record.runs = True
    if has_towers_only(model):
        sites: dict[str, Any] = {}
        for stack in ("text", "vision"):
            sites |= record.attempt(f"{stack} sites", resolve_sites, model, f"{stack}.*") or {}
    else:
        sites = record.attempt("sites", residua.model_sites, model) or {}
    record.offer(sites)
    record.n_blocks = len(record.offered.get("resid_post", []))
    for stack in dict.fromkeys(info.site.stack for info in sites.values()):
        of_it = {name: info for name, info in sites.items() if info.site.stack == stack}
        record.attempt(f"sites of {stack or 'the stack'}", _check_stack, model, record, stack, of_it, call, output, log)
    record.attempt("modules", check_modules, model, record, call, log)
    own = list(dict.fromkeys(info.site.stack for info in sites.values())) or [""]
    if not has_towers_only(model):
        record.attempt("reasons", note_reasons, model, record, sites, own)


class _Values:
    """The rows of one stack, and what the model gives for them: what `Checks` asks rows and truth for."""

    def __init__(
        self, values: Mapping[str, Tensor], hidden: Any, weights: Any, log: ModuleLog, again: Callable[[], Tensor]
    ) -> None:
        self.archives = [self]
        self.sites = tuple(values)
        self.hidden = [hidden]
        self.weights = [weights]
        self.log = log
        n = next((value.shape[1] for name, value in values.items() if name.startswith("resid_p")), 0)
        self.ids = [list(range(n))]
        self.logits: list[Tensor] = []
        self.again = again
        self._values = values

    def __call__(self, _example: int, site: str) -> Tensor:
        return self._values[site][0].float()


def _check_stack(
    model: PreTrainedModel,
    record: Record,
    stack: str,
    sites: Mapping[str, Any],
    call: Mapping[str, Any],
    output: Any,
    log: ModuleLog,
) -> None:
    kept: dict[str, Tensor] = {}
    patterns = {name: info for name, info in sites.items() if info.site.kind.endswith("pattern")}
    others = {name: info for name, info in sites.items() if name not in patterns and "logits" not in name}
    with torch.no_grad():
        if others:
            with residua.tap(model, others, lambda name, value: kept.update({name: value.clone()})):
                model(**call)
        weights = None
        if patterns:
            with eager(model), residua.tap(model, patterns, lambda name, value: kept.update({name: value.clone()})):
                weights = _of_stack(model(**call, output_attentions=True), stack, "attentions")
    values = {name.removeprefix(f"{stack}."): value for name, value in kept.items()}
    infos = {name.removeprefix(f"{stack}."): info for name, info in sites.items()}
    n_blocks = len([name for name in infos if name.startswith("resid_post.")])
    again = partial(_logits_of, model, call)
    truth: Any = _Values(values, _of_stack(output, stack, "hidden_states"), weights, log, again)
    noted = StackRecord(record, stack, n_blocks) if stack else record
    check = Checks(model, noted, infos, truth, truth, prefix=f"{stack}." if stack else "")
    check.all()


def _logits_of(model: PreTrainedModel, call: Mapping[str, Any]) -> Tensor:
    """Run a call once more, and return the first floating-point tensor of its output."""
    with torch.no_grad():
        output = model(**call)
    named = ("logits", "logits_per_image", "last_hidden_state")
    return next(found for name in named if isinstance(found := getattr(output, name, None), Tensor))


def _of_stack(output: Any, stack: str, what: str) -> tuple[Tensor, ...] | None:
    parts = {"text": "text_model_output", "vision": "vision_model_output"}
    if stack in parts:
        output = getattr(output, parts[stack], None)
    names = [f"{stack}_{what}"] if stack in STACKS[:2] else [what]
    found = next((getattr(output, name) for name in names if getattr(output, name, None) is not None), None)
    return None if found is None else tuple(found)


def check_modules(model: PreTrainedModel, record: Record, call: Mapping[str, Any], log: ModuleLog) -> None:
    """The second member of each outermost list of modules gives what `residua.tap` reads there, and a change acts."""
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    for path in outer[:4]:
        given = log.given.get(f"{path}.1", [])
        if len(given) != 1 or not given[0].is_floating_point():
            continue
        kept: dict[str, Tensor] = {}
        name = f"module:{path}.1@output"
        with residua.tap(model, name, kept.__setitem__), torch.no_grad():
            model(**call)
        good = name in kept and is_same(kept[name].float(), given[0].float())
        record.judge("module", None, good, f"{name} is not what the module gives", "module outputs")
        record.count_modules(1)
