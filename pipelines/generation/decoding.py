"""How new tokens are chosen: transformers' settings of generation, and sampling that depends on the example alone.

Each example has a seed, from which one uniform number a new token follows. The number chooses the token from the
distribution of the model, after temperature, top-k and the like (the inverse of its cumulative sum, in float64). So
neither the other examples of a batch, nor their order, nor the process that runs it decide about a token. What may
differ is rounding: a model's numbers change in the last bits with the size of a batch.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from residua.capture.layout.process_layout import spans_processes
from residua.capture.runtime.compat import merged_generation_config
from residua.capture.runtime.devices import input_device
from residua.capture.runtime.pipeline_schedule import stage_model_of
from residua.capture.runtime.sharded import is_sharded
from residua.capture.runtime.wrappers import core_of
from residua.capture.sites.anatomy import takes_pixels
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.store.base.canonical import Json, as_json
from residua.store.base.errors import CaptureError, PlanError
from residua.store.base.naming import named

_OFF: Mapping[str, tuple[object, ...]] = {  # values with which a setting has no effect
    "temperature": (None, 1),
    "top_k": (None, 0),
    "top_p": (None, 1),
    "min_p": (None,),
    "typical_p": (None, 1),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
}
_WARPERS: Mapping[str, Callable[..., LogitsProcessor]] = {  # in the order in which transformers applies them
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}
_OTHERS: Mapping[str, tuple[object, ...]] = {  # the same of settings that do not need sampling
    "repetition_penalty": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "min_new_tokens": (None, 0),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "remove_invalid_values": (None, False),
    "renormalize_logits": (None, False),
}
_FREE = ("do_sample", "eos_token_id", "use_cache")
_OF_PADDING = ("no_repeat_ngram_size", "bad_words_ids", "sequence_bias")  # padding counts as tokens there
_OWN = {"max_new_tokens": "generate", "temperature": "temperature", "top_p": "top_p", "top_k": "top_k"}
_REFUSED: Mapping[str, tuple[object, ...]] = {  # in the model's own config, where nobody asked for them
    "min_length": (None, 0),
    "top_h": (None,),
    "watermarking_config": (None,),
    "guidance_scale": (None, 1),
    "stop_strings": (None,),
}
_INSTEAD = {  # of settings that users ask for
    "num_return_sequences": "for several, give the prompt several times",
    "stop_strings": "give eos_token_id, or cut the texts afterwards",
}


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How new tokens are chosen.

    Attributes:
        config: The settings for transformers' ``generate``; sampling is done here, so that it is greedy for it.
        warpers: What changes the scores of the next token before it is sampled.
        is_sampled: Whether tokens are sampled.
        sees_padding: Whether a setting takes padding for tokens, so that prompts of several lengths run alone.
        entry: All settings that have an effect, as the plan records them.
    """

    config: GenerationConfig
    warpers: Sequence[LogitsProcessor]
    is_sampled: bool
    sees_padding: bool
    entry: Mapping[str, Json]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a continuation."""
        found = self.config.eos_token_id
        return tuple(found) if isinstance(found, list) else () if found is None else (int(found),)

    def processors(self, seeds: Sequence[int], n_prompt: int, device: torch.device) -> list[LogitsProcessor]:
        """Return what chooses the next tokens of a batch.

        Args:
            seeds: The seed of each example.
            n_prompt: Length of the padded prompts.
            device: Device of the scores.
        """
        if not self.is_sampled:
            return []
        numbers = np.stack([uniform_numbers(seed, int(self.config.max_new_tokens or 0)) for seed in seeds])
        return [*self.warpers, _Sampler(torch.from_numpy(numbers).to(device), n_prompt)]


def decoding_of(model: nn.Module, settings: CaptureSettings) -> Decoding:
    """Return how the model chooses new tokens, by the settings and by the generation config that comes with it.

    Sampling needs a setting that asks for it. A setting that neither has is off: transformers' default of ``top_k`` 50
    does not apply.

    Raises:
        PlanError: The model cannot generate, is held by several processes, or a setting cannot be used.
    """
    core: Any = core_of(model)
    _refuse_model(model, core)
    given = dict(settings.generation_arguments)
    _refuse_names(given)
    given |= {
        name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(settings, name)) is not None
    }
    is_sampled = bool(given.setdefault("do_sample", any(name in _WARPERS for name in given)))
    if not is_sampled and (asked := [name for name in given if name in _WARPERS]):
        raise PlanError(f"{asked[0]} is for sampling, and do_sample is false: leave one of them out")
    if is_sampled and "top_k" not in given and core.generation_config.top_k is None:
        given["top_k"] = 0
    try:
        config, _ = merged_generation_config(core, None, {**given, "max_new_tokens": settings.generate})
        config.validate()
        warpers = [
            make(value, **({"device": input_device(core)} if name == "eta_cutoff" else {}))
            for name, make in _WARPERS.items()
            if is_sampled and (value := getattr(config, name)) not in _OFF[name]
        ]
    except (ValueError, TypeError) as error:
        raise PlanError(
            f"{named('generate', settings.generate)}: transformers refuses the settings: {error}"
        ) from error
    for name, off in _REFUSED.items():
        if (value := getattr(config, name, None)) not in off:
            raise PlanError(
                f"the generation config of {type(core).__name__} has {name}={value!r:.40}, which is not supported: set "
                "it to its default there"
            )
    active = {name: value for name, off in _OTHERS.items() if (value := getattr(config, name, None)) not in off}
    drawn = {name: value for name, off in _OFF.items() if (value := getattr(config, name)) not in off}
    entry = {"new_tokens": settings.generate, "do_sample": is_sampled, **active, "eos_token_id": config.eos_token_id}
    if is_sampled:
        entry |= {**drawn, "seed": settings.seed}
    if config.use_cache is False:
        entry["use_cache"] = False
    return Decoding(
        config=_greedy(config),
        warpers=warpers,
        is_sampled=is_sampled,
        sees_padding=any(name in active for name in _OF_PADDING),
        entry=as_json(entry),
    )


def uniform_numbers(seed: int, n: int) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Return the numbers, at least 0 and below 1, that choose the new tokens of an example, float64, (new tokens).

    They are those of numpy's PCG64, the upper 53 bits of each word; its words are the same in every version.
    """
    words = np.random.PCG64(seed).random_raw(n)
    return (np.asarray(words, np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class _Sampler(LogitsProcessor):
    """Leaves one token to each example: the one that its number chooses."""

    def __init__(self, numbers_BT: Tensor, n_prompt: int) -> None:
        self._numbers_BT = numbers_BT
        self._n_prompt = n_prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with minus infinity for all tokens but the chosen one."""
        place = input_ids.shape[1] - self._n_prompt
        number_B1 = self._numbers_BT[:, place : place + 1]
        sums_BV = scores.to(number_B1.dtype).softmax(-1).cumsum(-1)
        all_B1 = sums_BV[:, -1:]
        if not all_B1.isfinite().all():
            raise CaptureError(
                f"{named('generate')}: new token {place + 1} cannot be sampled, since its scores are NaN or infinite: "
                "the model's logits overflow, or its temperature is too low"
            )
        aim_B1 = torch.minimum(number_B1 * all_B1, torch.nextafter(all_B1, torch.zeros_like(all_B1)))
        chosen_B1 = torch.searchsorted(sums_BV, aim_B1.contiguous(), right=True)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen_B1, 0.0)


def _refuse_model(model: nn.Module, core: Any) -> None:
    name = type(core).__name__
    if not issubclass(type(core), GenerationMixin) or takes_pixels(cast("PreTrainedModel", core)):
        raise PlanError(f"{named('generate')}: {name} generates no text: use a model with an LM head for causal text")
    if stage_model_of(core) is not None or spans_processes(core) or is_sharded(model):
        raise PlanError(
            f"{named('generate')}: {name} is held by several processes, and generation needs all of it in each: start "
            "processes with a replica each, or generate first and capture the full texts"
        )


def _refuse_names(given: Mapping[str, object]) -> None:
    known = (*_FREE, *_OTHERS, *_WARPERS)
    for name in given:
        if name in _OWN:
            raise PlanError(
                f"{named('generation_kwargs')}: {name} has a setting of its own, {named(_OWN[name])}: use it"
            )
        if name not in known:
            instead = f" ({_INSTEAD[name]})" if name in _INSTEAD else ""
            raise PlanError(
                f"{named('generation_kwargs')}: {name!r} is not a setting with which a prompt gets one continuation of "
                f"its own, token by token{instead}; there are {', '.join(name for name in known if name not in _OWN)}"
            )


def _greedy(config: GenerationConfig) -> GenerationConfig:
    """Return the settings for transformers: the most probable token of the scores that it is given."""
    found = copy.deepcopy(config)
    for name, (value, *_) in {**_OFF, "top_k": (50,), "temperature": (1.0,), "top_p": (1.0,)}.items():
        setattr(found, name, value)
    fixed = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}
    unused = {"prompt_lookup_num_tokens": None, "penalty_alpha": None, "cache_implementation": None}
    for name, value in {**fixed, **unused, "max_length": None, "disable_compile": True}.items():
        setattr(found, name, value)
    if found.pad_token_id is None:
        found.pad_token_id = 0
    return found
