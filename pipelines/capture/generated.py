"""The capture job whose examples are prompts of a dataset and what the model makes of them.

Generation comes first: worker 0 reads the prompts, all workers continue them unit by unit, and what comes is kept in
the spool beside the archive. Then the plan is made as for any dataset. Once the archive is there it has the examples,
and a run that goes on compares the prompts, and generates nothing.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from residua.capture.runtime.sharded import without_gradients
from residua.pipelines.capture.dataset_job import CaptureRequest, DatasetCapture
from residua.pipelines.data.tokenizer import special_ids
from residua.pipelines.generation.continuing import ALONE, Continuer
from residua.pipelines.generation.decoding import decoding_of
from residua.pipelines.generation.prompts import (
    BEGINS,
    ENDED,
    GENERATED,
    PromptReader,
    in_order,
    seeds_of,
    units_of,
)
from residua.pipelines.generation.spool import Spool
from residua.pipelines.jobs.workers import Workers
from residua.pipelines.setup.models import token_limit
from residua.store.base.canonical import Json
from residua.store.base.errors import DatasetError, PlanError
from residua.store.base.naming import named
from residua.store.examples.index import Example, ExampleIndex, IntArray
from residua.store.examples.writer import ExampleWriter
from residua.store.format.archive_metadata import is_archive
from residua.store.format.create import bring_archive
from residua.store.format.plan import Plan
from residua.store.selection.positions import kept_positions
from residua.store.storage.destination import Destination

GENERATION = "generation"
"""Key of a plan's ``rules`` and of the provenance: how the text of the examples was generated."""

_IDLE_SECONDS = 0.05


class GeneratedCapture(DatasetCapture):
    """The capture of prompts and of their continuations.

    Raises:
        PlanError: The model cannot generate, or a setting of generation cannot be used.
    """

    def __init__(self, model: PreTrainedModel, out: Destination, request: CaptureRequest) -> None:
        self._decoding = decoding_of(model, request.settings)
        super().__init__(model, out, request)
        self._n_new = request.settings.generate or 0
        vocab_size = model.config.get_text_config().vocab_size
        self._reader = PromptReader(
            dataset=request.dataset,
            settings=request.settings,
            tokenizer=request.tokenizer,
            model_limit=token_limit(model),
            vocab_size=vocab_size,
            is_sampled=self._decoding.is_sampled,
            end_ids=self._decoding.end_ids,
            on_example=request.on_example,
        )
        self._spool = Spool(self.out, n_new=self._n_new, vocab_size=vocab_size)
        self._prompts: Mapping[str, Json] = {}

    def prepare(self, workers: Workers) -> None:
        """Read the prompts, and continue those that are not continued yet."""
        continuer = Continuer(self.model, self._decoding)
        if continuer.alone:
            self.notes.append(ALONE)
        found = workers.once("prompts", self._read_prompts)
        self._prompts = found["prompts"]
        bring_archive(self.out)
        if found["is_written"] or is_archive(self.out.path):
            return
        self._check_made()
        table = self._spool.table()
        units, seeds = self._units(table.index()), seeds_of(table)
        with without_gradients(self.model):
            for unit in workers.units("generate", len(units), self._spool.done):
                if unit is None:
                    time.sleep(_IDLE_SECONDS)
                    continue
                prompts = units[unit]
                ids = [tokens for tokens, _ in table.batch(prompts)]
                new = continuer.continuations(ids, [seeds[prompt] for prompt in prompts])
                self._spool.write(unit, prompts, new)
                self._request.on_generated(len(self._spool.done()), len(units))

    def _read_prompts(self) -> Mapping[str, Any]:
        """Read the prompts; if there is no archive yet, into the spool, whose continuations are checked."""
        bring_archive(self.out)
        if is_archive(self.out.path):
            self._spool.remove()
            with TemporaryDirectory(prefix="residua-prompts-") as folder:
                index = self._reader.write(Path(folder) / "prompts", self._report)
            return {"prompts": _identity(index), "is_written": True}
        try:
            self._spool.clear_prompts()
            index = self._reader.write(self._spool.prompts, self._report)
            self._spool.share_prompts()
            self._prompts = _identity(index)
            self._spool.begin(self._made())
        except Exception:  # whatever the dataset raises
            if not self._spool.done():
                self._spool.remove()
            raise
        if self._reader.n_ended:
            self.notes.append(
                f"{self._reader.n_ended} prompts end with a token that ends texts, after which the model begins anew: "
                f"{named('add_special_tokens', False)} keeps a tokenizer from adding it"
            )
        if n_damaged := self._spool.drop_damaged(self._units(index)):
            self.notes.append(
                f"{n_damaged} batches of generated text were damaged in {self._spool}: they are made again"
            )
        return {"prompts": self._prompts, "is_written": False}

    def _made(self) -> dict[str, Json]:
        """Return what decides about the continuations."""
        return {
            "model": dict(self.identity),
            "generation": dict(self._decoding.entry),
            "prompts": dict(self._prompts),
            "batch_tokens": self._settings.batch_tokens,
        }

    def _check_made(self) -> None:
        if self._spool.made() != self._made():
            raise PlanError(
                f"{self._spool} is of another model or other settings of generation than this process has: start all "
                "processes with the same model and settings"
            )

    def _units(self, index: ExampleIndex) -> list[list[int]]:
        return units_of(index.n_tokens, self._n_new, self._settings.batch_tokens)

    def write_examples(self, folder: Path) -> ExampleIndex:
        """Write prompts and continuations as examples; if the archive is there, return those that it has."""
        report = self._report
        if is_archive(self.out.path):
            index = self.written_examples()
            report.n_examples, report.n_tokens, report.n_rows = index.n_examples, index.total_tokens, index.total_rows
        else:
            index = self._write(folder)
        self.shared["dataset"] = asdict(report)
        return index

    def _write(self, folder: Path) -> ExampleIndex:
        table, report = self._spool.table(), self._report
        report.n_examples = report.n_tokens = report.n_rows = 0
        special = np.array(sorted(special_ids(self._tokenizer)), np.int32)
        writer = ExampleWriter(folder)
        new = in_order(self._units(table.index()), self._spool.read)
        for number, columns in table.own_columns():
            example = self._example(table.tokens(number), next(new), columns, special)
            if not example.positions.size:
                report.n_without_rows += 1
                continue
            writer.add(example)
            report.count(example)
        if not report.n_examples:
            raise DatasetError(f"the dataset gives no example: {'; '.join(report.notes())}")
        return writer.close()

    def _example(self, prompt: IntArray, new: IntArray, columns: Mapping[str, object], special: IntArray) -> Example:
        input_ids = np.concatenate([prompt, new])
        dropped = np.isin(input_ids, special) if self._settings.drop_special else None
        own = {
            BEGINS: prompt.size,
            GENERATED: [False] * prompt.size + [True] * new.size,
            ENDED: "stop" if new[-1] in self._decoding.end_ids else "length",
        }
        rule = self._settings.rule
        positions = kept_positions(rule, input_ids.size, dropped=dropped, n_prompt=prompt.size)
        return Example(input_ids=input_ids, positions=positions, columns={**columns, **own})

    def rules(self) -> dict[str, Json]:
        """Return the settings that shape the examples, as the plan records them."""
        how = {**self._decoding.entry, "batch_tokens": self._settings.batch_tokens, "prompts": dict(self._prompts)}
        return {**super().rules(), GENERATION: how}

    def provenance(self, plan: Plan) -> dict[str, Any]:
        """Return how the archive is made, as JSON values."""
        return {**super().provenance(plan), GENERATION: plan.rules[GENERATION]}

    def finish(self) -> None:
        """Remove the spool."""
        self._spool.remove()


def _identity(index: ExampleIndex) -> dict[str, Json]:
    return {"digest": index.digest, "n": index.n_examples}
