"""Generating text from a replayed prompt: stored rows and edits in the prompt, and edits on new tokens if asked for.

New tokens need the prompt's keys and values in every block, also in the blocks that a replay skips. So the model runs
the prompt in full, the stored rows replace what it computes, and generation continues from there.

transformers divides the tokens among forward passes as its settings say: the prompt at once or in chunks, one new token
a pass or several, or every token again without a cache. `_PassPositions` finds out which tokens a pass computes, from
the length of the cache, and `_GenerationSteps` changes those tokens.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from residua.capture.buffers.row_index import Indices, batch_rows
from residua.capture.edits.action import ChosenRows
from residua.capture.edits.prepare import PreparedEdit
from residua.capture.forward.plan_batch import PlanBatch, one_by_one
from residua.capture.identity.padding import padding_leaks
from residua.capture.replay.engine import Replayer
from residua.capture.runtime.compat import merged_generation_config
from residua.capture.runtime.pipeline_schedule import stage_model_of
from residua.capture.taps.tap import tap
from residua.store.base.errors import CaptureError, PlanError

_PROMPT_OPTIONS = (
    "inputs",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "past_key_values",
    "decoder_input_ids",
    "encoder_outputs",
)
"""Arguments of transformers' ``generate`` that say what is continued."""
_MODES = ("greedy_search", "sample", "beam_search", "beam_sample", "assisted_generation")
"""Values of transformers' `GenerationMode` whose forward passes all continue the prompts."""


class GenerationOptions(TypedDict, total=False):
    """Options of transformers' ``generate``, as named arguments; ``generation_config`` takes all others."""

    generation_config: GenerationConfig
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    num_beams: int
    length_penalty: float
    early_stopping: bool | str
    min_new_tokens: int
    bad_words_ids: list[list[int]]
    suppress_tokens: list[int]
    eos_token_id: int | list[int]
    pad_token_id: int
    stop_strings: str | list[str]
    tokenizer: PreTrainedTokenizerBase
    use_cache: bool
    cache_implementation: str
    prefill_chunk_size: int
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    assistant_model: PreTrainedModel
    prompt_lookup_num_tokens: int


def generate(
    replayer: Replayer,
    examples: Sequence[int],
    *,
    max_new_tokens: int,
    edit_new_tokens: bool,
    seed: int,
    options: Mapping[str, Any],
) -> list[list[int]]:
    """Continue replayed prompts; see `residua.capture.replay.replay.Replay.generate`."""
    core: Any = replayer.core  # transformers' own annotation of generate fits no model
    _refuse_models(replayer)
    given, own = _with_defaults(core, options, max_new_tokens)
    config, others = merged_generation_config(core, given, own)
    _refuse_options(config, others, is_changed=bool(replayer.changed_sites))
    replayer.recorded.refuse(examples, "generation")
    batches = []
    for group in replayer.groups(replayer.batch(examples, padding="left")):
        has_padding = not bool(group.padded.attention_mask.all())
        alone = runs_alone(config, others) or (has_padding and padding_leaks(replayer.model, side="left"))
        batches += one_by_one(group) if alone else [group]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found: dict[int, list[int]] = {}
        for batch in batches:
            steps = _GenerationSteps(replayer, batch, edit_new_tokens=edit_new_tokens)
            with ExitStack() as stack:
                stack.enter_context(replayer.attention())
                if steps.sites:
                    infos = replayer.infos(steps.sites)
                    stack.enter_context(tap(replayer.model, infos, steps.change, tensor_parallel=replayer.group))
                    begun = core.register_forward_pre_hook(steps.positions.begin_pass, with_kwargs=True)
                    stack.callback(begun.remove)
                padded = batch.padded
                generated: Tensor = core.generate(
                    input_ids=padded.input_ids, attention_mask=padded.attention_mask, generation_config=given, **own
                )
            for example, row in zip(batch.rows, generated[:, batch.n_positions :].tolist(), strict=True):
                found[example.example] = _until_end(row, config)
    return [found[example] for example in examples]


def _refuse_models(replayer: Replayer) -> None:
    """Raise PlanError for a model that does not continue its examples, or an edit that does not fit."""
    core = replayer.core
    if replayer.rows.main.stack:
        raise PlanError(
            f"{type(core).__name__} is an encoder-decoder, and a replay does not continue its targets: replay the "
            "tokens that it gave, or call model.generate inside residua.tap"
        )
    if not issubclass(type(core), GenerationMixin):
        raise PlanError(f"{type(core).__name__} generates no text")
    if stage_model_of(core) is not None:
        raise PlanError("a torch pipeline generates no text: its stages keep no keys and values from token to token")
    if any("logits" in edit.actions for edit in replayer.edits):
        raise PlanError(
            "an edit changes the logits, and generation computes them for the last token only: edit 'final'"
        )


def _with_defaults(
    core: Any, options: Mapping[str, Any], max_new_tokens: int
) -> tuple[GenerationConfig | None, dict[str, Any]]:
    """Return the user's generation config and options with the settings that we add where the user gives none.

    They go into the config if there is one: transformers does not like a config and options together.
    """
    own = dict(options)
    given: GenerationConfig | None = own.pop("generation_config", None)
    defaults: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": False}
    if core.generation_config.pad_token_id is None:
        defaults["pad_token_id"] = 0
    if given is None:
        return None, {**defaults, **own, "max_new_tokens": max_new_tokens}
    given = copy.deepcopy(given)
    for name, value in defaults.items():
        if getattr(given, name, None) is None:
            setattr(given, name, value)
    given.max_new_tokens = max_new_tokens
    return given, {name: value for name, value in own.items() if name != "max_new_tokens"}


def _refuse_options(config: GenerationConfig, others: Mapping[str, Any], *, is_changed: bool) -> None:
    """Raise PlanError for settings that do not fit, wherever they come from, before the model runs."""
    if named := [name for name in _PROMPT_OPTIONS if others.get(name) is not None]:
        raise PlanError(f"generate got {named[0]}, and the prompts are the examples of the replay: leave it out")
    if config.return_dict_in_generate:
        raise PlanError("generation was asked for more than tokens; leave return_dict_in_generate out")
    if (config.num_return_sequences or 1) > 1:
        raise PlanError(
            f"num_return_sequences is {config.num_return_sequences}, and each example gets one sequence: set it to 1, "
            "and generate again with another seed for another one"
        )
    if is_changed and (name := runs_other_tokens(config, others, _MODES)):
        raise PlanError(
            f"generation was asked for {name}, which runs the model on other tokens than the examples and what "
            "follows them, so stored rows and edits have no place there: leave it out"
        )


def runs_other_tokens(config: GenerationConfig, others: Mapping[str, Any], modes: Collection[str]) -> str:
    """Return the setting that makes ``generate`` run a model on other tokens than prompts and what follows them.

    Args:
        config: The settings, merged with those of the model.
        others: The options that are no settings.
        modes: Values of transformers' `GenerationMode` that are fine.

    Returns:
        The setting, for a message; empty if there is none.
    """
    mode = str(config.get_generation_mode(others.get("assistant_model")).value)
    problems = {
        f"the mode {mode}": mode not in modes,
        "custom_generate": others.get("custom_generate") is not None,
        f"guidance_scale={config.guidance_scale}": config.guidance_scale not in (None, 1),
        "token_healing": bool(config.token_healing),
        "cache_implementation='paged'": config.cache_implementation == "paged",
    }
    return next((name for name, is_wrong in problems.items() if is_wrong), "")


def runs_alone(config: GenerationConfig, others: Mapping[str, Any]) -> bool:
    """Return whether examples are continued one by one: several at a time are refused or padded beyond their end."""
    mode = str(config.get_generation_mode(others.get("assistant_model")).value)
    return mode == "assisted_generation" or bool(config.stop_strings) or bool(others.get("stopping_criteria"))


@dataclass(frozen=True)
class _Window:
    """The positions that a site's tensor has in one forward pass.

    Attributes:
        start: The first of them; they count from the padded beginning of the prompts.
        length: Their number.
        n_copies: Rows of the tensor's first axis for each example, one after the other: beams.
    """

    start: int
    length: int
    n_copies: int


class _PassPositions:
    """Finds out which positions each forward pass computes.

    Args:
        batch: The prompts.
    """

    def __init__(self, batch: PlanBatch) -> None:
        self._prompt_ids = batch.padded.input_ids
        self._end = 0  # of the positions of the last pass
        self._n_copies = 1

    def begin_pass(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the positions of the pass that begins; a forward pre-hook.

        Raises:
            CaptureError: The pass is not over the prompts and what follows them.
        """
        ids = kwargs.get("input_ids", next(iter(args), None))
        n_examples, n_prompt = self._prompt_ids.shape
        if not isinstance(ids, Tensor) or ids.shape[0] % n_examples:
            raise CaptureError(self._refusal("without their tokens"))
        start = self._cached(kwargs)
        self._n_copies = ids.shape[0] // n_examples
        prompt_ids = self._prompt_ids[:, start : start + ids.shape[1]].repeat_interleave(self._n_copies, dim=0)
        if not torch.equal(ids[:, : prompt_ids.shape[1]], prompt_ids.to(ids.device)):
            raise CaptureError(self._refusal("with other tokens than theirs"))
        if start > max(self._end, n_prompt):
            raise CaptureError(self._refusal(f"from position {start} on, before it computed position {self._end}"))
        self._end = start + ids.shape[1]

    def _cached(self, kwargs: Mapping[str, Any]) -> int:
        """Return how many positions the cache holds."""
        names = ("past_key_values", "cache_params")
        cached = next((kwargs[name] for name in names if kwargs.get(name) is not None), None)
        if cached is None:
            return 0
        try:
            return int(cached.get_seq_length())
        except (AttributeError, ValueError):  # a recurrent state counts nothing, and cannot go back
            return self._end

    def _refusal(self, found: str) -> str:
        return (
            f"generation ran the model {found}, so the stored rows and edits of the examples have no place there: "
            "leave out the settings that make it do so"
        )

    def window(self, length: int) -> _Window:
        """Return the positions of a tensor of `length` positions in this pass.

        Keys and values reach back to the first cached position, or hold the room that a static cache has reserved.
        Tensors at the LM head may have the last positions only.
        """
        return _Window(max(0, self._end - length), length, self._n_copies)


class _GenerationSteps:
    """Changes the tokens that a forward pass computes: those of the prompts, and new ones if they are edited too.

    Attributes:
        positions: Says which tokens these are; it has to know when a pass begins.
        sites: The sites that change.
    """

    def __init__(self, replayer: Replayer, batch: PlanBatch, *, edit_new_tokens: bool) -> None:
        self.positions = _PassPositions(batch)
        self._replayer = replayer
        self._batch = batch
        self._n_prompt = batch.n_positions
        self._stored = batch_rows(batch.rows, batch.n_positions)
        self._in_prompt = {edit.number: edit.choose(batch) for edit in replayer.edits}
        self._on_new = {edit.number for edit in replayer.edits if edit_new_tokens and _fits_new_tokens(edit)}
        edited = [
            edit for edit in replayer.edits if len(self._in_prompt[edit.number].source) or edit.number in self._on_new
        ]
        self.sites = list(dict.fromkeys([*replayer.start.sites, *(site for edit in edited for site in edit.actions)]))
        self._chosen = cache(self._choose)

    def change(self, name: str, tensor: Tensor) -> Tensor:
        """Change the tensor of a site."""
        window = self.positions.window(tensor.shape[1])
        if name in self._replayer.start.sites:
            taken, source = self._inside(self._stored.source, window)
            if len(taken):
                tensor = self._replayer.put_in(name, tensor, source=source, row=self._stored.row[taken])
        for edit in self._replayer.edits:
            if name in edit.actions:
                chosen = self._chosen(edit.number, window)
                if len(chosen.source):
                    tensor = edit.step(name, chosen)(tensor)
        return tensor

    def _choose(self, number: int, window: _Window) -> ChosenRows:
        """Return the rows of a window that an edit changes."""
        prompt = self._in_prompt[number]
        taken, source = self._inside(prompt.source, window)
        old = {name: values[taken] for name, values in vars(prompt).items()} | {"source": source}
        new = self._new_tokens(number, window)
        order = np.argsort(np.concatenate([source, new["source"]]), kind="stable")
        return ChosenRows(**{name: np.concatenate([old[name], new[name]])[order] for name in old})

    def _inside(self, prompt_source: Indices, window: _Window) -> tuple[Indices, Indices]:
        """Return which of some indices into the prompts lie in a window, and their indices there, in order."""
        example, position = np.divmod(prompt_source, self._n_prompt)
        taken = np.flatnonzero((position >= window.start) & (position < window.start + window.length))
        copies = np.arange(window.n_copies)[:, None]
        row = example[taken] * window.n_copies + copies
        source = (row * window.length + position[taken] - window.start).reshape(-1)
        order = np.argsort(source, kind="stable")
        return np.tile(taken, window.n_copies)[order], source[order]

    def _new_tokens(self, number: int, window: _Window) -> dict[str, Indices]:
        """Return the new tokens in a window that an edit changes; they have no row in the archive."""
        edit = self._replayer.edits[number - 1]
        first = max(window.start, self._n_prompt)
        tokens = [
            (
                (place * window.n_copies + one) * window.length + position - window.start,
                example.example,
                len(example.input_ids) + position - self._n_prompt,
            )
            for place, example in enumerate(self._batch.rows)
            if number in self._on_new and edit.rows.selector.includes(edit.edit.chosen, example.example)
            for one in range(window.n_copies)
            for position in range(first, window.start + window.length)
        ]
        source, numbers, positions = np.array(tokens, np.int64).reshape(-1, 3).T
        no_row = np.full(len(tokens), -1, np.int64)
        return {"source": source, "example": numbers, "position": positions, "row": no_row, "from_row": no_row}


def _fits_new_tokens(edit: PreparedEdit) -> bool:
    """Return whether an edit applies to every token and needs no stored row of it."""
    return edit.edit.chosen.is_every_token and not edit.edit.needs_stored_rows


def _until_end(tokens: list[int], config: GenerationConfig) -> list[int]:
    """Cut off the padding after the token that ended an example."""
    ends = config.eos_token_id
    is_end = (token in ends if isinstance(ends, list) else token == ends for token in tokens)
    length = next((place + 1 for place, found in enumerate(is_end) if found), len(tokens))
    return tokens[:length]
