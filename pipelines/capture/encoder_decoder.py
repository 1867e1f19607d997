"""The capture of an encoder-decoder over pairs: one pass for each stack whose rows are asked for.

The dataset is read once, as pairs. Each stack has an archive of its own in the folder `out`, which an ordinary capture
job fills, resumes and seals: with its own plan, batches and workers. The pass of the encoder ends before the decoder
runs, unless keys or values of cross-attention are asked for; the pass of the decoder runs the full model.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from residua.capture.hooks.site import SiteInfo
from residua.capture.recording.stats import RecordStats
from residua.capture.runtime.wrappers import evaluating, replica_of, running_uncompiled
from residua.capture.sites.names_to_modules import resolve_sites
from residua.capture.sites.stacks import row_stack, stacks_of, takes_pairs
from residua.pipelines.capture.capture import DatasetCapture, DatasetSource
from residua.pipelines.data.dataset import DatasetReport
from residua.pipelines.data.pairs import PairTokens, read_pairs
from residua.pipelines.data.tokenizer import special_ids
from residua.pipelines.jobs.workers import WorkerFigures, Workers, working_together
from residua.pipelines.setup.models import load_model, load_tokenizer, token_limit
from residua.pipelines.setup.settings import CaptureSettings
from residua.store.base.canonical import Json
from residua.store.base.errors import DatasetError, PlanError
from residua.store.base.naming import named
from residua.store.examples.index import SOURCE_IDS, ExampleIndex, IntArray
from residua.store.examples.table import ExampleTable
from residua.store.examples.writer import ExampleWriter
from residua.store.format.plan import STACK_RULE, Plan
from residua.store.format.stacks import create_stacks
from residua.store.read.archive import Archive
from residua.store.read.stacks import open_archive
from residua.store.sealing.losses import loss_notes
from residua.store.storage.place import try_place

_STACKS = ("encoder", "decoder")


class PairCapture(NamedTuple):
    """What was done; the fields are those of a `CaptureResult`."""

    archive: Archive
    dataset: DatasetReport
    workers: tuple[WorkerFigures, ...]
    resumed: bool
    notes: tuple[str, ...]


def capture_pairs(
    model: Any,
    dataset: DatasetSource,
    out: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: CaptureSettings,
    *,
    processor: object,
    tensor_parallel: object,
    command: str | None,
    on_example: Callable[[int, int], None],
    on_plan: Callable[[Plan, int], None],
    on_batch: Callable[[RecordStats], None],
) -> PairCapture:
    """Capture an encoder-decoder; the arguments are those of `capture_dataset`.

    Raises:
        PlanError: The model is split, cannot be run on pairs of tokens, or was begun with other sites.
    """
    if tensor_parallel is not None or settings.tp * settings.pp > 1 or not settings.gather:
        raise PlanError(
            f"an encoder-decoder is captured by processes that each hold all of it: leave {named('tp')}, "
            f"{named('pp')}, {named('gather', False)} and tensor_parallel out; several processes still share the shards"
        )
    if processor is not None or settings.image_column is not None:
        raise PlanError(
            f"processor and {named('image_column')} are for models over images, and an encoder-decoder is captured "
            "over pairs of tokens: leave them out"
        )
    place = try_place(out, locks=True, links=True)
    if isinstance(model, str | PathLike):
        tokenizer = tokenizer or load_tokenizer(fspath(model), settings)
        model = load_model(fspath(model), settings)
    model = cast("PreTrainedModel", replica_of(model))
    sites = _sites_by_rows(model, settings)
    create_stacks(place.path, list(sites))
    with ExitStack() as stack:
        notes = list(place.notes)
        if stack.enter_context(running_uncompiled(model)):
            notes.append("compiled code does not run hooks: the model ran uncompiled for this capture")
        stack.enter_context(evaluating(model))
        pairs = _Pairs(model, dataset, tokenizer, settings, on_example, stack.enter_context(TemporaryDirectory()))
        figures, resumed, report = list[WorkerFigures](), list[bool](), DatasetReport()
        for name, infos in sites.items():
            job = _StackCapture(name, infos, pairs, place.path / name, command)
            with working_together(job.out, settings, job=name) as membership:
                found, shared = job.run(Workers(membership), on_plan, on_batch)
            figures += found
            resumed.append(shared["resumed"])
            report = DatasetReport(**shared["dataset"])
            notes += [*job.notes, *loss_notes(job.archive.plan, job.archive.commits)]
    return PairCapture(
        archive=open_archive(place.path),
        dataset=report,
        workers=tuple(figures),
        resumed=any(resumed),
        notes=tuple(dict.fromkeys([*notes, *report.notes()])),
    )


def _sites_by_rows(model: PreTrainedModel, settings: CaptureSettings) -> dict[str, dict[str, SiteInfo]]:
    """Return the sites by the stack whose positions their rows are, in the order in which stacks run."""
    stacks, name = {stack.name: stack for stack in stacks_of(model)}, type(model).__name__
    if not stacks or not takes_pairs(model):
        raise PlanError(
            f"{name} is an encoder-decoder that does not take token ids on both sides ({model.main_input_name} of the "
            "encoder), and datasets of its inputs are not read here: call it in your own loop inside residua.Recorder"
        )
    found: dict[str, dict[str, SiteInfo]] = {stack: {} for stack in _STACKS}
    for site, info in resolve_sites(model, [settings.sites]).items():
        found[row_stack(info, stacks["encoder"])][site] = info
    return {stack: infos for stack, infos in found.items() if infos}


@dataclass
class _Pairs:
    """The pairs of a dataset, read once in each process that needs them, as one example table for each stack."""

    model: PreTrainedModel
    dataset: DatasetSource
    tokenizer: PreTrainedTokenizerBase | None
    settings: CaptureSettings
    on_example: Callable[[int, int], None]
    folder: str
    report: DatasetReport | None = field(default=None, init=False)

    def write(self, stack: str, folder: Path) -> DatasetReport:
        """Write the examples of one stack to `folder`; raises DatasetError if the dataset cannot be used as asked."""
        if self.report is None:
            self.report = self._read()
        shutil.copytree(Path(self.folder) / stack, folder)
        return self.report

    def _read(self) -> DatasetReport:
        if self.settings.drop_special and self.tokenizer is None:
            raise DatasetError(
                f"{named('drop_special', True)} needs a tokenizer, and the model has none: nothing says which tokens "
                "are special"
            )
        limit, vocabulary = token_limit(self.model), int(self.model.config.get_text_config().vocab_size)
        tokens = PairTokens(
            tokenizer=self.tokenizer,
            shifted=partial(_shifted, self.model),
            source_limit=limit,
            target_limit=limit,
            special_ids=special_ids(self.tokenizer),
            source_vocab=vocabulary,
            target_vocab=int(getattr(self.model.config, "decoder_vocab_size", None) or vocabulary),
        )
        report = DatasetReport()
        writers = {stack: ExampleWriter(Path(self.folder) / stack) for stack in _STACKS}
        for pair in read_pairs(self.dataset, settings=self.settings, tokens=tokens, report=report):
            writers["encoder"].add(pair.encoder)
            writers["decoder"].add(pair.decoder)
            self.on_example(report.n_examples, report.n_tokens)
        for writer in writers.values():
            writer.close()
        return report


def _shifted(model: PreTrainedModel, labels: IntArray) -> IntArray:
    """Return the decoder's token ids for labels, by the rule of the model."""
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        raise DatasetError(
            f"{type(model).__name__} does not say how labels become the tokens of its decoder: load it with its "
            "language modelling head, or give these tokens themselves in a column decoder_input_ids"
        )
    found: IntArray = shift(labels=torch.from_numpy(labels.astype(np.int64))[None])[0].numpy().astype(np.int32)
    return found


class _StackCapture(DatasetCapture):
    """The capture of the rows of one stack."""

    def __init__(
        self, stack: str, sites: Mapping[str, SiteInfo], pairs: _Pairs, out: Path, command: str | None
    ) -> None:
        super().__init__(
            pairs.model, out, pairs.tokenizer, pairs.dataset, pairs.settings, command, pairs.on_example, sites=sites
        )
        self._stack = stack
        self._pairs = pairs
        self._sources: Mapping[str, Json] = {}
        self._n_source_tokens = 0

    def write_examples(self, folder: Path) -> ExampleIndex:
        """Write the stack's examples; the dataset is read by the first stack that needs them."""
        self._report = self._pairs.write(self._stack, folder)
        self.shared["dataset"] = asdict(self._report)
        return self._known(folder)

    def written_examples(self) -> ExampleIndex:
        """Return the examples that worker 0 wrote."""
        return self._known(self.out / "examples")

    def _known(self, folder: Path) -> ExampleIndex:
        """Note what the plan needs of the sources beside a decoder's examples."""
        table = ExampleTable(folder)
        index = table.index()
        if self._stack == "decoder":
            digest, lengths = hashlib.sha256(), []
            for start in range(0, index.n_examples, 1024):
                for ids in table.lists(SOURCE_IDS, range(start, min(start + 1024, index.n_examples))):
                    digest.update(np.array([ids.size], "<i8").tobytes() + ids.astype("<i4").tobytes())
                    lengths.append(ids.size)
            self._sources = {"source": digest.hexdigest(), "longest_source": max(lengths)}
            self.longest_source, self._n_source_tokens = max(lengths), sum(lengths)
        return index

    def dataset_of_plan(self, index: ExampleIndex) -> dict[str, Json]:
        """Return what the plan records of the examples, and of a decoder's sources."""
        return {**super().dataset_of_plan(index), **self._sources}

    def rules(self) -> dict[str, Json]:
        """Return the settings, and the stack that has the rows."""
        return {**super().rules(), STACK_RULE: self._stack}

    def batch_tokens(self, asked: int, index: ExampleIndex) -> int:
        """Return the most positions of a batch: fewer in a decoder whose sources are longer, for these run too."""
        if self._n_source_tokens > index.total_tokens:
            asked = max(1, asked * index.total_tokens // self._n_source_tokens)
        return super().batch_tokens(asked, index)
