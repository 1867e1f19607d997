"""The files that an archive keeps about its model: LM head, attention facts, tokenizer.

``attention.json`` says how each layer's attention weights follow from stored queries and keys. A layer passes its
scale, soft cap, window and sinks to the attention function; a tap reads these arguments while the model runs over a few
tokens. Then they are proved: weights computed from them must equal those of the model's own eager attention on these
tokens. Where they differ (because of a position bias, for example), the file gives the reason instead; to have the
weights of that layer, capture ``pattern``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from residua.capture.hooks.attention import AttentionTap, eager_attention, intercepting
from residua.capture.hooks.forward_call import trial
from residua.capture.hooks.own_attention import OwnAttention
from residua.capture.hooks.site import SiteInfo
from residua.capture.identity.few_tokens import FewTokens, refuse_without_memory, run_few_tokens
from residua.capture.identity.lm_head import lm_head_files, lm_head_problem
from residua.capture.runtime.collectives import all_gather_objects
from residua.capture.runtime.process_groups import pipeline_group, tensor_parallel_group
from residua.capture.sites.anatomy import Anatomy
from residua.capture.sites.pipeline_stages import target_of
from residua.capture.sites.reference_model import unsharded_anatomy
from residua.store.base.errors import few
from residua.store.format.sidecars import (
    ATTENTION_FILE,
    NO_LM_HEAD,
    AttentionSpec,
    attention_from_json,
    attention_to_json,
)
from residua.store.storage.crc import Buffer
from residua.store.storage.files import write_file

Sidecars = dict[str, list[Buffer]]
"""Files by name; the content of each is a list of buffers."""
Facts = dict[int, AttentionSpec | str]

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_LOW_PRECISION_TOLERANCE = 0.1  # a model may round in another order than we do, and one rounding of bfloat16 shows


def sidecar_files(
    model: nn.Module, sites: Mapping[str, SiteInfo], *, head: bool, notes: list[str], few: FewTokens | None = None
) -> Sidecars:
    """Return the files of the archive's ``head`` folder; a collective of all processes that hold the model.

    Args:
        model: The model.
        sites: The sites that are stored.
        head: Add the LM head: final norm and unembedding.
        notes: Gets a sentence for each thing that is not known of the model.
        few: Its run over a few tokens, if there was one.
    """
    problem = lm_head_problem(model, few) if head else ""
    if problem:
        notes.append(f"{NO_LM_HEAD}: {problem}")
    files = {**(lm_head_files(model) if head and not problem else {}), **attention_files(model, sites)}
    notes.extend(attention_notes(files))
    return files


def attention_notes(files: Sidecars) -> list[str]:
    """Return a sentence for each reason why attention weights cannot be computed from stored queries and keys."""
    if ATTENTION_FILE not in files:
        return []
    facts = attention_from_json(b"".join(bytes(piece) for piece in files[ATTENTION_FILE]))
    layers: dict[str, list[int]] = {}
    for layer, fact in facts.items():
        if isinstance(fact, str):
            layers.setdefault(fact, []).append(layer)
    return [
        f"attention weights of layers {few(found)} cannot be computed from stored queries and keys, since {reason}; "
        "capture pattern for them"
        for reason, found in layers.items()
    ]


def write_sidecars(archive: Path, files: Sidecars) -> None:
    """Write the files to an archive that is being made."""
    for name, content in files.items():
        write_file(archive / "head" / name, content)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the files of `tokenizer` to `folder`, durably.

    Raises:
        OSError: A file could not be written; the message says where and why.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the Rust library raises plain Exception, for example when the disk is full
        raise OSError(
            f"cannot write the tokenizer to {folder} ({error}): free some space there, or choose another place"
        ) from error
    for path in sorted(folder.iterdir()):
        write_file(path, [path.read_bytes()])


def attention_files(model: nn.Module, sites: Mapping[str, SiteInfo]) -> Sidecars:
    """Return ``attention.json``, if a layer has both `q` and `k` among `sites`.

    The model runs once over a few tokens. A collective of all processes that hold it.
    """
    anatomy = unsharded_anatomy(model)
    layers = [] if anatomy is None else [n for n in range(len(anatomy.blocks)) if {f"q.{n}", f"k.{n}"} <= set(sites)]
    if anatomy is None or not layers:
        return {}
    here = target_of(model).modules
    of_layers = {layer: sites[f"q.{layer}"].own for layer in layers if anatomy.blocks[layer] in here}
    facts = _attention_facts(anatomy, of_layers)
    ranks = all_gather_objects(tensor_parallel_group(model, None), facts)  # each has the facts of its own heads
    if len(ranks) > 1:
        facts = {layer: _joined([found[layer] for found in ranks]) for layer in facts}
    stages = all_gather_objects(pipeline_group(model), facts)
    return {ATTENTION_FILE: [attention_to_json({layer: fact for found in stages for layer, fact in found.items()})]}


def _joined(found: Sequence[AttentionSpec | str]) -> AttentionSpec | str:
    """Return the facts of all heads of a layer, given those of each rank's heads."""
    specs = [spec for spec in found if isinstance(spec, AttentionSpec)]
    if len(specs) < len(found):
        return next(reason for reason in found if isinstance(reason, str))
    if specs[0].sinks is None:
        return specs[0]
    return replace(specs[0], sinks=tuple(sink for spec in specs for sink in spec.sinks or ()))


def _attention_facts(anatomy: Anatomy, layers: Mapping[int, OwnAttention | None]) -> Facts:
    """Run the model over a few tokens to find out how the weights of `layers` follow from queries and keys.

    Args:
        anatomy: The model's modules.
        layers: The layers, each with the place of its attention if the model computes it in its own code.

    Returns:
        For each layer how they follow, proved on those tokens, or the reason why that is not known. Reasons are stored
        in the archive.
    """
    listeners = {layer: _Listener() for layer in layers}
    taps = {
        module: listener
        for layer, listener in listeners.items()
        for module in anatomy.modules[anatomy.blocks[layer]].modules()
    }
    own = {anatomy.modules[place.module]: place for place in layers.values() if place is not None}
    try:
        with eager_attention(anatomy.model), trial(anatomy.model), intercepting(taps, own):
            run_few_tokens(anatomy.model)
    except Exception as error:  # noqa: BLE001 - the boundary to the user's model, and the capture itself needs none of this
        refuse_without_memory(error)
        return dict.fromkeys(listeners, f"the model could not be run over a few tokens to find out: {error}")
    return {
        layer: listener.facts(
            _window(anatomy, layer, listener) if layers[layer] is None else _window_of_own_code(anatomy.config)
        )
        for layer, listener in listeners.items()
    }


class _Listener(AttentionTap):
    """Keeps the inputs, the arguments and the weights of one layer's attention."""

    kinds = frozenset(("q", "k", "pattern"))

    def __init__(self) -> None:
        self.arguments: Mapping[str, Any] | None = None
        self._seen: dict[str, Tensor] = {}

    def __call__(self, kind: str, tensor: Tensor) -> None:
        self._seen[kind] = tensor

    def note_arguments(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments

    def facts(self, window: int | str | None) -> AttentionSpec | str:
        """Return the facts of this layer, given its window or the reason why the window is not known."""
        if self.arguments is None or len(self._seen) < len(self.kinds):
            return "its attention did not come through transformers' attention interface under eager attention"
        if isinstance(window, str):
            return window
        pattern_BHQK, query_BHQD, key_BHKD = (self._seen[kind] for kind in ("pattern", "q", "k"))
        causal = not pattern_BHQK.triu(1).any()
        if window is not None and not causal:
            return "its attention has a window and is not causal"
        scaling, sinks = self.arguments.get("scaling"), self.arguments.get("s_aux")
        specs = [
            AttentionSpec(
                scale=float(scale),
                causal=causal,
                softcap=self.arguments.get("softcap"),
                window=window,
                sinks=None if sinks is None else tuple(sinks.double().flatten().tolist()),
            )
            for scale in ((query_BHQD.shape[-1] ** -0.5, 1.0) if scaling is None else (scaling,))
        ]
        errors = [float((_weights(spec, query_BHQD, key_BHKD) - pattern_BHQK).abs().max()) for spec in specs]
        error, spec = min(zip(errors, specs, strict=True), key=lambda pair: pair[0])
        if not error <= _TOLERANCE.get(pattern_BHQK.dtype, _LOW_PRECISION_TOLERANCE):
            return f"its attention weights do not follow from q and k alone: they differ by {error:.2g} on a few tokens"
        return spec


def _weights(spec: AttentionSpec, query_BHQD: Tensor, key_BHKD: Tensor) -> Tensor:
    """Return the attention weights of full examples, in the model's dtype and with the rounding of eager attention."""
    key_BHKD = key_BHKD.repeat_interleave(query_BHQD.shape[1] // key_BHKD.shape[1], dim=1)
    score_BHQK = query_BHQD @ key_BHKD.transpose(2, 3) * spec.scale
    if spec.softcap is not None:
        score_BHQK = torch.tanh(score_BHQK / spec.softcap) * spec.softcap
    n_positions = score_BHQK.shape[-1]
    distance_QK = torch.arange(n_positions)[:, None] - torch.arange(n_positions)
    seen_QK = distance_QK >= 0 if spec.causal else torch.ones_like(distance_QK, dtype=torch.bool)
    seen_QK &= distance_QK < (spec.window or n_positions)
    score_BHQK = score_BHQK.masked_fill(~seen_QK.to(score_BHQK.device), -torch.inf)
    if spec.sinks is not None:
        sinks_BHQ1 = score_BHQK.new_tensor(spec.sinks)[:, None, None].expand(*score_BHQK.shape[:3], 1)
        score_BHQK = torch.cat([score_BHQK, sinks_BHQ1], dim=-1)
    return score_BHQK.softmax(-1, torch.float32 if score_BHQK.dtype.itemsize < 4 else None)[..., :n_positions]


def _window_of_own_code(config: PreTrainedConfig) -> str | None:
    """Return why the window of a model's own attention is not known, if its config has one under any name."""
    names = [name for name, value in vars(config).items() if "window" in name and isinstance(value, int) and value]
    names += [name for name in ("block_size", "attention_layers") if getattr(config, name, None)]
    return f"its config names {few(names)}, and which blocks look how far is not known" if names else None


def _window(anatomy: Anatomy, layer: int, listener: _Listener) -> int | str | None:
    """Return how far this layer's queries look, or the reason why config and layer do not agree on it.

    The few tokens can only prove windows that are shorter than they are.
    """
    given: int | None = (listener.arguments or {}).get("sliding_window")
    types: list[str] | None = getattr(anatomy.config, "layer_types", None)
    if types is not None:
        if types[layer] not in ("full_attention", "sliding_attention"):
            return f"its attention is of the type {types[layer]}, whose mask is not known"
        agree = (types[layer] == "sliding_attention") == (given is not None)
    else:
        configured = getattr(anatomy.config, "sliding_window", None)
        agree = given == configured or not getattr(anatomy.config, "use_sliding_window", True)
    return given if agree else f"its config and its attention do not agree on a window ({given} is what it is told)"
