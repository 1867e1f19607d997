"""``generate`` of a recorded model: which calls of it can be recorded, and what its result says about the examples.

A call is refused before the model runs if its passes are not over prompts and what follows them, or if nothing says
which of its tokens belong to which example.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from residua.capture.recording.arguments import Bools, Ids
from residua.capture.replay.generation import runs_alone, runs_other_tokens
from residua.capture.runtime.compat import has_state_without_length, merged_generation_config
from residua.capture.runtime.instance_attributes import instance_attribute
from residua.capture.runtime.wrappers import core_of
from residua.store.base.errors import CaptureError

_MODES = ("greedy_search", "sample", "assisted_generation")
"""Values of transformers' `GenerationMode` whose passes go on with the examples in their order."""
_BEAMS = ("beam_search", "beam_sample", "group_beam_search", "constrained_beam_search")
_NOT_TOKENS = ("inputs_embeds", "past_key_values", "position_ids", "decoder_input_ids", "encoder_outputs")
_TOKEN_AXES = 2
_HINT = "Generate outside the recorder, then call the model on the full sequences inside"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A call of ``generate`` that is recorded.

    Attributes:
        n_prompt: Length of the padded prompts.
        mask: Which positions of the prompts are tokens, (sequences, positions); several sequences a prompt included.
        n_sequences: Sequences of each prompt.
        end_ids: The tokens that end a sequence.
        drops_passes: Whether candidates are run of which some are not taken.
    """

    n_prompt: int
    mask: Bools
    n_sequences: int
    end_ids: tuple[int, ...]
    drops_passes: bool

    def tokens(self, output: Any) -> tuple[Ids, Bools, Bools]:
        """Return the tokens that ``generate`` gave, and which of them belong to examples, and which of these ran.

        After the token that ends a sequence there is padding, which belongs to nobody. The last token of an example is
        the one that was chosen last: the model need not have run on it, and it has no row, whether it did or not.
        """
        found = output if isinstance(output, Tensor) else output.sequences
        ids: Ids = found.detach().cpu().numpy().astype(np.int32)
        is_token = np.ones(ids.shape, np.bool_)
        is_token[:, : self.n_prompt] = self.mask
        for sequence, tokens in enumerate(ids[:, self.n_prompt :]):
            ends = np.flatnonzero(np.isin(tokens, self.end_ids))
            if ends.size:
                is_token[sequence, self.n_prompt + int(ends[0]) + 1 :] = False
        ran = is_token.copy()
        for sequence, tokens in enumerate(is_token):
            ran[sequence, np.flatnonzero(tokens)[-1:]] = False
        return ids, is_token, ran


@contextmanager
def recording_generation(
    model: nn.Module,
    *,
    refuse: Callable[[], str],
    begin: Callable[[Generation], None],
    end: Callable[[Generation, Any], None],
    abandon: Callable[[], None],
) -> Iterator[None]:
    """Follow the calls of a model's ``generate`` inside.

    Args:
        model: The recorded model.
        refuse: Says why this recorder records no generation; empty if it does.
        begin: Called before the model runs.
        end: Called with what ``generate`` returned.
        abandon: Called if it raises.
    """
    core: Any = core_of(model)
    n_inside = 0

    def followed(original: Callable[..., Any]) -> Callable[..., Any]:
        def generate(*args: Any, **kwargs: Any) -> Any:
            nonlocal n_inside
            if n_inside:  # a wrapper calls the model inside
                return original(*args, **kwargs)
            generation = _checked(core, refuse(), args, kwargs)
            begin(generation)
            n_inside += 1
            try:
                output = original(*args, **kwargs)
                end(generation, output)
            except BaseException:
                abandon()
                raise
            finally:
                n_inside -= 1
            return output

        return generate

    with ExitStack() as stack:
        for one in {id(one): one for one in (model, core)}.values():
            if callable(getattr(one, "generate", None)):
                own: Any = one
                stack.enter_context(instance_attribute(one, "generate", followed(own.generate)))
        yield


def _checked(core: Any, refusal: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Generation:
    """Return what a call of ``generate`` does.

    Raises:
        CaptureError: It cannot be recorded; the message names what stands in the way.
    """
    refusal = refusal or _model_problem(core)
    if refusal:
        raise CaptureError(f"generate was called inside a recorder, and {refusal}. {_HINT}")
    mixin: Any = GenerationMixin
    given = signature(mixin.generate).bind_partial(core, *args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    del given["self"]
    inputs = given.get("input_ids") if given.get("inputs") is None else given.pop("inputs")
    others = {name: value for name, value in given.items() if value is not None and name != "generation_config"}
    config, rest = merged_generation_config(core, given.get("generation_config"), others)
    problem = _problem(core, config, rest, inputs)
    if problem or not isinstance(inputs, Tensor):
        raise CaptureError(f"generate was called inside a recorder with {problem}. {_HINT}")
    n_sequences = int(config.num_return_sequences or 1)
    ends = config.eos_token_id
    return Generation(
        n_prompt=int(inputs.shape[1]),
        mask=np.repeat(_prompt_mask(inputs, given.get("attention_mask"), config), n_sequences, axis=0),
        n_sequences=n_sequences,
        end_ids=tuple(ends) if isinstance(ends, list) else () if ends is None else (int(ends),),
        drops_passes=str(config.get_generation_mode(rest.get("assistant_model")).value) == "assisted_generation",
    )


def _model_problem(core: Any) -> str:
    name = type(core).__name__
    if not isinstance(core, GenerationMixin):
        return f"{name} has a generate of its own, whose passes are not known"
    if has_state_without_length(core):
        return f"{name} keeps a state that does not say how many positions it holds"
    return ""


def _problem(core: Any, config: Any, others: Mapping[str, Any], inputs: object) -> str:
    """Return what cannot be recorded; empty if all can."""
    if foreign := next((name for name in _NOT_TOKENS if others.get(name) is not None), ""):
        return f"{foreign}, so that its examples do not begin with the tokens of prompts"
    if (
        not isinstance(inputs, Tensor)
        or inputs.ndim != _TOKEN_AXES
        or inputs.is_floating_point()
        or not inputs.shape[1]
    ):
        return "no prompts of token ids: pass input_ids of shape (examples, positions)"
    tensors = [
        name
        for name, value in others.items()
        if isinstance(value, Tensor) and name not in ("input_ids", "attention_mask")
    ]
    if tensors:
        return f"{tensors[0]}, whose values for new tokens are not known"
    mode = str(config.get_generation_mode(others.get("assistant_model")).value)
    if mode in _BEAMS:
        return (
            f"num_beams={config.num_beams}: beams are reordered while they grow, so it is not clear which example a "
            "row belongs to"
        )
    if name := runs_other_tokens(config, others, _MODES):
        return f"{name}, which runs the model on other tokens than prompts and what follows them"
    if others.get("assistant_model") is core or getattr(config, "assistant_early_exit", None):
        return "the recorded model as its own assistant, whose passes cannot be told from each other"
    n_examples = inputs.shape[0] * int(config.num_return_sequences or 1)
    if n_examples > 1 and runs_alone(config, others):
        return (
            "stop_strings, stopping_criteria or an assistant for several sequences: where each of them ends is not "
            "clear; generate them one at a time"
        )
    return ""


def _prompt_mask(inputs: Tensor, mask: object, config: Any) -> Bools:
    """Return which positions of the prompts are tokens, as transformers takes them.

    Raises:
        CaptureError: The mask is not one of tokens.
    """
    shape = tuple(inputs.shape)
    if mask is None:
        pad, ends = config.pad_token_id, config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        is_pad = inputs == pad if pad is not None and pad not in ends else torch.zeros_like(inputs, dtype=torch.bool)
        found: Bools = (~is_pad).cpu().numpy()
        return found
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape or not bool(((mask == 0) | (mask == 1)).all()):
        raise CaptureError(
            f"generate was called inside a recorder with an attention_mask that is not 0 or 1 for each of {shape} "
            f"positions: pass 1 for a token and 0 for padding. {_HINT}"
        )
    given: Bools = (mask == 1).cpu().numpy()
    return given
