"""A run as an archive: the capture of its examples and sites, with its edits, in the batches in which it ran."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from residua.capture.replay.captured import CapturedReplay
from residua.capture.replay.engine import Replayer
from residua.capture.replay.prompts import Prompts
from residua.pipelines.capture.dataset_job import CaptureRequest, DatasetCapture
from residua.pipelines.jobs.workers import Workers, working_together
from residua.pipelines.runs.texts import Texts
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.store.base.canonical import Json, digest_of
from residua.store.base.errors import PlanError
from residua.store.base.naming import named
from residua.store.edits.contents import contents_of
from residua.store.edits.parser import is_reproducible
from residua.store.examples.index import ExampleIndex
from residua.store.examples.writer import ExampleWriter
from residua.store.format.plan import REPLAY_RULE, Plan
from residua.store.read.archive import Archive
from residua.store.storage.destination import Destination
from residua.store.storage.place import try_archive_place


def save_run(
    replayer: Replayer,
    sites: Sequence[str],
    out: str | PathLike[str],
    *,
    texts: Texts,
    dtype: str | None,
    codec: str,
    storage_options: Mapping[str, Any] | None,
) -> Archive:
    """Capture sites of a run's examples into an archive; see `residua.pipelines.runs.result.Run.save`.

    Every process that holds the model calls this, while the model is ready to run.
    """
    if not isinstance(replayer.source, Prompts):
        raise PlanError(
            f"{replayer.source.place} is an archive already, and this is a replay of it: residua.replay_dataset with "
            f"{named('capture')} keeps what follows from rows and edits"
        )
    if not sites:
        raise PlanError(f"the run kept no site that could be saved: name some with {named('sites')} of residua.run")
    prompts = replayer.source
    settings = CaptureSettings(
        sites=",".join(sites),
        dtype=dtype,
        codec=codec,
        rows_per_shard=prompts.rows_per_shard,
        batch_tokens=prompts.batch_tokens,
    )
    place = try_archive_place(out, storage_options)
    with ExitStack() as stack:
        membership = stack.enter_context(working_together(place.out, settings))
        job = RunCapture(replayer, prompts, place.out, texts, settings)
        job.notes.extend(place.notes)
        job.run(Workers(membership), lambda *_: None, lambda _: None)
    return job.archive


class RunCapture(DatasetCapture):
    """The capture of a run's examples, with its edits.

    Args:
        replayer: Runs the examples with the edits.
        prompts: The examples.
        out: Where the archive is written.
        texts: The tokenizer.
        settings: What is stored, and how.
    """

    def __init__(
        self, replayer: Replayer, prompts: Prompts, out: Destination, texts: Texts, settings: CaptureSettings
    ) -> None:
        replaying = None
        if replayer.edits:
            replaying = CapturedReplay(replayer, np.arange(len(prompts.example_table)))
        else:
            replayer.recorded.refuse(range(len(prompts.example_table)), "a capture of a run")
        request = CaptureRequest(dataset=prompts.example_table, settings=settings, tokenizer=texts.of_model)
        super().__init__(replayer.core, out, request, replaying=replaying)
        self._prompts = prompts
        self._edits = [edit.edit for edit in replayer.edits]
        self.notes.extend(replayer.notes)

    def write_examples(self, folder: Path) -> ExampleIndex:
        """Write the examples of the run to `folder`."""
        writer, report = ExampleWriter(folder), self._report
        for example in self._prompts.example_table:
            writer.add(example)
            report.n_sources += 1
            report.count(example)
        return writer.close()

    def rules(self) -> dict[str, Json]:
        """Return the settings that shape the examples, and what identifies the edits, if there are any."""
        return {**super().rules(), **({REPLAY_RULE: digest_of(self._described())} if self._edits else {})}

    def provenance(self, plan: Plan) -> dict[str, Any]:
        """Return how the archive is made; with edits, which ones, and whether they suffice to repeat the run."""
        facts = {**self._described(), "reproducible": is_reproducible(self._edits)}
        return {
            **super().provenance(plan),
            "dataset": {"kind": "run"},
            **({REPLAY_RULE: facts} if self._edits else {}),
        }

    def _described(self) -> dict[str, Json]:
        return {
            "edits": [edit.to_json() for edit in self._edits],
            "contents": contents_of(self._edits),
        }
