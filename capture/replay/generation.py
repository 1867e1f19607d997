"""Going on from a replayed prompt: stored rows and edits in the prompt, edits on new tokens too if that is wanted.

New tokens need the keys and values of the prompt in every block, also in those that a replay leaves out. So the model
runs the prompt in full; the stored rows replace what it computes, and the rest follows.
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
    """Let the model go on from the replayed prompts; see `residua.capture.replay.replay.Replay.generate`."""
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
            raise PlanError(f"{name} is over 1: rows and edits are placed for one sequence an example, so set it to 1")
    batch = replayer.batch(examples, padding="left")
    steps = _Steps(replayer, batch, edit_new_tokens=edit_new_tokens)
    padded = batch.padded
    settings = {"do_sample": False, **options, "max_new_tokens": max_new_tokens}
    settings.setdefault("pad_token_id", _padding_of(core))
    with ExitStack() as stack:
        if steps.sites:
            stack.enter_context(tap(replayer.model, steps.sites, steps.change, tensor_parallel=replayer.group))
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(seed)
        made: object = core.generate(input_ids=padded.input_ids, attention_mask=padded.attention_mask, **settings)
    if not isinstance(made, Tensor):
        raise PlanError("generation was asked for more than tokens; leave return_dict_in_generate out")
    return [_until_end(row, core) for row in made[:, batch.n_positions :].tolist()]


class _Steps:
    """Changes prompts at their first pass, and new tokens, one a pass, after that."""

    def __init__(self, replayer: Replayer, batch: PlanBatch, *, edit_new_tokens: bool) -> None:
        self._batch = batch
        self._prompt = replayer.steps(batch, edited=True)
        self._edits = [edit for edit in replayer.edits if edit_new_tokens and _fits_new_tokens(edit)]
        self._selector = replayer.selector
        self._n_passes: Counter[str] = Counter()
        new_sites = (site for edit in self._edits for site in edit.actions)
        self.sites = list(dict.fromkeys([*self._prompt, *new_sites]))

    def change(self, name: str, tensor: Tensor) -> Tensor:
        """Apply what is due at a site."""
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
        """The new token of each example that the edit means; it has no row in the archive."""
        meant = [
            (place, example.example, len(example.input_ids) + number)
            for place, example in enumerate(self._batch.rows)
            if self._selector.includes(edit.edit.chosen, example.example)
        ]
        source, numbers, positions = np.array(meant, np.int64).reshape(-1, 3).T
        nowhere = np.full(len(meant), -1)
        return ChosenRows(source=source, example=numbers, position=positions, row=nowhere, from_row=nowhere)


def _fits_new_tokens(edit: PreparedEdit) -> bool:
    """Whether an edit is meant for any token at all, and needs no stored row of it."""
    return edit.edit.chosen.is_every_token and not edit.edit.needs_stored_rows


def _padding_of(core: Any) -> int:
    found = core.generation_config.pad_token_id
    return int(found) if found is not None else 0


def _ends_of(core: Any) -> set[int]:
    found = core.generation_config.eos_token_id
    return set(found) if isinstance(found, list) else {found}


def _until_end(tokens: list[int], core: Any) -> list[int]:
    """Cut off the padding behind the token that ended an example."""
    ends = _ends_of(core)
    last = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]
