"""Generating text from a replayed prompt: stored rows and edits in the prompt, and edits on new tokens if asked for.

New tokens need the prompt's keys and values in every block, also in the blocks that a replay skips. So the model runs
the prompt in full, the stored rows replace what it computes, and generation continues from there.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationMixin

from residua.capture.edits.action import ChosenRows
from residua.capture.edits.prepare import PreparedEdit
from residua.capture.forward.plan_batch import PlanBatch
from residua.capture.replay.engine import Replayer
from residua.capture.runtime.pipeline_schedule import stage_model_of
from residua.capture.taps.tap import tap
from residua.store.base.errors import PlanError


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
    if not issubclass(type(core), GenerationMixin):
        raise PlanError(f"{type(core).__name__} generates no text")
    if stage_model_of(core) is not None:
        raise PlanError("a torch pipeline generates no text: its stages keep no keys and values from token to token")
    if any("logits" in edit.actions for edit in replayer.edits):
        raise PlanError(
            "an edit changes the logits, and generation computes them for the last token only: edit 'final'"
        )
    for name in ("num_beams", "num_return_sequences"):
        if (options.get(name) or getattr(core.generation_config, name, None) or 1) > 1:
            raise PlanError(f"{name} is over 1: rows and edits are placed for one sequence per example, so set it to 1")
    batch = replayer.batch(examples, padding="left")
    steps = _GenerationSteps(replayer, batch, edit_new_tokens=edit_new_tokens)
    padded = batch.padded
    pad_token = core.generation_config.pad_token_id
    settings = {"do_sample": False, "pad_token_id": 0 if pad_token is None else pad_token, **options}
    settings["max_new_tokens"] = max_new_tokens
    with ExitStack() as stack:
        if steps.sites:
            stack.enter_context(tap(replayer.model, steps.sites, steps.change, tensor_parallel=replayer.group))
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(seed)
        generated: object = core.generate(input_ids=padded.input_ids, attention_mask=padded.attention_mask, **settings)
    if not isinstance(generated, Tensor):
        raise PlanError("generation was asked for more than tokens; leave return_dict_in_generate out")
    return [_until_end(row, core) for row in generated[:, batch.n_positions :].tolist()]


class _GenerationSteps:
    """Changes the prompts in their first pass, and new tokens, one a pass, after that.

    Attributes:
        sites: The sites that change.
    """

    def __init__(self, replayer: Replayer, batch: PlanBatch, *, edit_new_tokens: bool) -> None:
        self._batch = batch
        self._prompt = replayer.steps(batch, edited=True)
        self._edits = [edit for edit in replayer.edits if edit_new_tokens and _fits_new_tokens(edit)]
        self._n_passes: Counter[str] = Counter()
        self.sites = list(dict.fromkeys([*self._prompt, *(site for edit in self._edits for site in edit.actions)]))

    def change(self, name: str, tensor: Tensor) -> Tensor:
        """Change the tensor of a site."""
        self._n_passes[name] += 1
        if self._n_passes[name] == 1:
            for step in self._prompt.get(name, ()):
                tensor = step(tensor)
            return tensor
        for edit in self._edits:
            chosen = self._new_tokens(edit, self._n_passes[name] - 2)
            if name in edit.actions and len(chosen.source):
                tensor = edit.step(name, chosen)(tensor)
        return tensor

    def _new_tokens(self, edit: PreparedEdit, number: int) -> ChosenRows:
        """Return the new token of each example that the edit applies to; it has no row in the archive."""
        tokens = [
            (place, example.example, len(example.input_ids) + number)
            for place, example in enumerate(self._batch.rows)
            if edit.selector.includes(edit.edit.chosen, example.example)
        ]
        source, numbers, positions = np.array(tokens, np.int64).reshape(-1, 3).T
        no_row = np.full(len(tokens), -1)
        return ChosenRows(source=source, example=numbers, position=positions, row=no_row, from_row=no_row)


def _fits_new_tokens(edit: PreparedEdit) -> bool:
    """Return whether an edit applies to every token and needs no stored row of it."""
    return edit.edit.chosen.is_every_token and not edit.edit.needs_stored_rows


def _until_end(tokens: list[int], core: Any) -> list[int]:
    """Cut off the padding after the token that ended an example."""
    ends = core.generation_config.eos_token_id
    is_end = (token in ends if isinstance(ends, list) else token == ends for token in tokens)
    length = next((place + 1 for place, found in enumerate(is_end) if found), len(tokens))
    return tokens[:length]
