"""The capture job whose examples are those of a dataset, and what it is asked for."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from time import time_ns
from typing import Any, Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from residua.capture.forward.example_inputs import InputSource
from residua.capture.hooks.site import SiteInfo, plan_sites
from residua.capture.identity.provenance import (
    describe_model,
    environment,
    identify_tokenizer,
)
from residua.capture.identity.sidecars import save_tokenizer
from residua.capture.layout.process_layout import ProcessLayout, spans_processes
from residua.capture.recording.column_shards import column_shards
from residua.capture.recording.stats import RecordStats
from residua.capture.replay.captured import CapturedReplay
from residua.capture.runtime.wrappers import replica_of
from residua.capture.sites.anatomy import takes_pixels
from residua.capture.sites.names_to_modules import resolve_sites
from residua.capture.sites.reference_model import unsharded_sites
from residua.capture.sites.shape_probe import measure_sites
from residua.pipelines.capture.images import load_processor
from residua.pipelines.capture.job import CaptureJob
from residua.pipelines.data.dataset import DatasetReport, dataset_identity, read_examples
from residua.pipelines.data.reading import Reading, reading_of
from residua.pipelines.data.tokenizer import require_special, special_ids
from residua.pipelines.images.examples import ImageDataset
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.pipelines.setup.models import load_model, load_tokenizer, token_limit, transformers_model
from residua.store.base.canonical import Json
from residua.store.base.errors import PlanError
from residua.store.base.naming import named
from residua.store.examples.index import Example, ExampleIndex, dataset_entry
from residua.store.examples.writer import ExampleWriter
from residua.store.format.archive_metadata import said_of
from residua.store.format.plan import Plan, check_host_memory, choose_rows_per_shard, host_buffer_bytes
from residua.store.format.row_columns import HAS_IMAGES, IMAGE_ROW_BYTES
from residua.store.read.archive import Archive
from residua.store.storage.destination import BucketFolder, Destination

DatasetSource = str | PathLike[str] | Iterable[Any]


@dataclass(frozen=True, kw_only=True)
class CaptureRequest:
    """Arguments of `residua.capture_dataset` as they mean the same for each archive; what they mean is said there."""

    dataset: DatasetSource
    settings: CaptureSettings
    tokenizer: PreTrainedTokenizerBase | None = None
    processor: object | None = None
    command: str | None = None
    known: Archive | None = None  # finished, of the same examples, which are not made again where plans may grow
    on_example: Callable[[int, int], None] = lambda *_: None
    on_generated: Callable[[int, int], None] = lambda *_: None
    on_plan: Callable[[Plan, int], None] = lambda *_: None
    on_batch: Callable[[RecordStats], None] = lambda _: None

    def loaded(self, model: Any, needs_processor: Callable[[PreTrainedModel], bool]) -> tuple[PreTrainedModel, Self]:
        """Return the model, and the request with what was loaded with it, if `model` is a hub id or a folder.

        Raises:
            PlanError: There is no such model or device, tokenizer or processor cannot be loaded, or it is another kind
                of model.
        """
        if not isinstance(model, str | PathLike):
            return transformers_model(replica_of(model), "capture_dataset"), self
        name, processor = fspath(model), self.processor
        tokenizer = self.tokenizer or load_tokenizer(name, self.settings)
        found = load_model(name, self.settings)
        if processor is None and needs_processor(found):
            processor = load_processor(name, self.settings.revision)
        return found, replace(self, tokenizer=tokenizer, processor=processor)


class DatasetCapture(CaptureJob):
    """The capture of a dataset's examples."""

    def __init__(
        self,
        model: PreTrainedModel,
        out: Path | Destination,
        request: CaptureRequest,
        *,
        images: ImageDataset | None = None,
        sites: Mapping[str, SiteInfo] | None = None,
        replaying: CapturedReplay | None = None,
    ) -> None:
        settings = request.settings
        if sites is None:
            sites = (unsharded_sites if spans_processes(model) else resolve_sites)(model, [settings.site_patterns])
        if takes_pixels(model):
            unmeasured = {name: info for name, info in sites.items() if info.row_shape is None}
            sites = {**sites, **measure_sites(model, unmeasured)}
        super().__init__(
            model,
            sites,
            out,
            head=settings.head,
            threads=settings.threads,
            keep_paths=settings.keep_paths,
            replaying=replaying,
        )
        self._request = request
        self._tokenizer = request.tokenizer
        self._dataset = request.dataset
        self._settings = settings
        self._images = images
        self._report = DatasetReport()
        self._read: dict[str, Json] = {}  # what the examples were read from, for `known_examples`
        self.longest_source: int | None = None

    def write_examples(self, folder: Path) -> ExampleIndex:
        """Read the dataset once, and write its examples; raises DatasetError if it cannot be used as asked."""
        report = self._report
        writer = ExampleWriter(folder)
        began, reading = time_ns(), self._reading()
        for example in self.examples():
            writer.add(example)
            self._request.on_example(report.n_examples, report.n_tokens)
        if reading is not None and reading.held(self._dataset, self._settings, began):
            self._read = {"reading": reading.digest, "report": asdict(report)}
        self.shared["dataset"] = asdict(report)
        if self._images is not None:
            self.shared["images"] = str(self._images.folder)
        return writer.close()

    def examples(self) -> Iterator[Example]:
        """Open the dataset and return its examples, which are counted while they are read.

        Raises:
            DatasetError: Here or while iterating: the dataset cannot be used as asked.
        """
        tokenizer, report = self._tokenizer, self._report
        if self._images is None:
            require_special(self._settings, tokenizer)
        else:
            limit = None if takes_pixels(self.model) else token_limit(self.model)  # a tower's may be one of rows alone
            return self._images.examples(self._dataset, model_limit=limit, report=report)
        return read_examples(
            self._dataset,
            settings=self._settings,
            tokenizer=tokenizer,
            model_limit=token_limit(self.model),
            vocab_size=self.model.config.get_text_config().vocab_size,
            special_ids=special_ids(tokenizer),
            report=report,
        )

    def known_examples(self) -> ExampleIndex | None:
        """Return the archive's examples if dataset, settings and tokenizer are surely those that gave them."""
        known = said_of("dataset", self.archive.provenance)
        if "reading" not in known:
            return None
        reading, report = self._reading(), DatasetReport.of(known.get("report"))
        if reading is None or report is None or known["reading"] != reading.digest:
            return None
        self._report = report
        self.shared["dataset"] = asdict(report)
        return self.written_examples()

    def _reading(self) -> Reading | None:
        """Return what the examples follow from, if that is known without reading the dataset."""
        if type(self) is not DatasetCapture or self._images is not None:  # others make more of the dataset
            return None
        return self._reading_of_rows()

    def _reading_of_rows(self) -> Reading | None:
        return reading_of(
            self._dataset,
            self._settings,
            tokenizer=self._tokenizer,
            model_limit=token_limit(self.model),
            vocab_size=self.model.config.get_text_config().vocab_size,
        )

    def plan(self, index: ExampleIndex) -> Plan:
        """Return the plan; raises PlanError if not even the smallest shard fits into host memory."""
        return self.plan_of(
            self.dataset_of_plan(index),
            batch_tokens=self.batch_tokens(self._settings.batch_tokens, index),
            longest_example=int(index.n_tokens.max()),
            most_rows=int(index.n_rows.max()),
            n_rows=index.total_rows,
        )

    def plan_of(
        self,
        dataset: Mapping[str, Json],
        *,
        batch_tokens: int,
        longest_example: int,
        most_rows: int,
        n_rows: int | None,
        tokens_per_row: float = 1.0,
        most_shard_tokens: float = math.inf,
    ) -> Plan:
        """Return the plan for examples of which some numbers are known.

        Args:
            dataset: What the plan records of the examples.
            batch_tokens: Most token positions of a batch.
            longest_example: Most tokens of an example.
            most_rows: Most rows of an example.
            n_rows: Rows of all examples; None while that is not known.
            tokens_per_row: Tokens of the examples for each row of theirs.
            most_shard_tokens: How many tokens may have to be read for one shard, unless `rows_per_shard` is set.

        Raises:
            PlanError: Not even the smallest shard fits into host memory.
        """
        settings, batch_rows = self._settings, math.ceil(batch_tokens / tokens_per_row)
        sites = plan_sites(
            self.sites,
            dtype=settings.dtype,
            codec=settings.codec,
            longest_example=longest_example,
            longest_source=self.longest_source,
            column_shards=self.column_shards,
        )
        row_bytes = [site.row_bytes for site in sites]
        row_bytes += [] if self._images is None else [IMAGE_ROW_BYTES]
        height = settings.rows_per_shard or choose_rows_per_shard(
            row_bytes,
            batch_rows=batch_rows if n_rows is None else min(batch_rows, n_rows),
            most_rows_per_example=most_rows,
            host_memory_bytes=settings.host_memory_bytes,
            most_rows=most_shard_tokens / tokens_per_row,
        )
        buffered = height if n_rows is None else min(height, n_rows)
        check_host_memory(row_bytes, most_rows, buffered, settings.host_memory_bytes)
        if isinstance(self.out, BucketFolder):
            buffers = host_buffer_bytes(sum(row_bytes), most_rows, buffered)
            self.out.use_memory(settings.host_memory_bytes - buffers, max(row_bytes) * buffered)
        if height < batch_rows and (n_rows is None or height < n_rows):
            limit = named("host_memory") if settings.rows_per_shard is None else f"{named('rows_per_shard')}"
            self.notes.append(
                f"a shard holds {height:,} rows, and a batch no more than that, although "
                f"{named('batch_tokens', settings.batch_tokens)} allows more: raise {limit} for larger batches"
            )
        return Plan(
            model=self.identity,
            dataset=dataset,
            rules=self.rules(),
            sites=sites,
            rows_per_shard=height,
            batch_tokens=batch_tokens,
            n_rows=n_rows,
        )

    def inputs(self, shared: Mapping[str, Any]) -> InputSource | None:
        """Return what makes the images of examples; None without images."""
        return None if self._images is None else self._images.inputs(Path(shared["images"]))

    def dataset_of_plan(self, index: ExampleIndex) -> dict[str, Json]:
        """Return what the plan records of the examples."""
        return {**dataset_entry(index), **({} if self._images is None else {HAS_IMAGES: True})}

    def rules(self) -> dict[str, Json]:
        """Return the settings that shape the examples, as the plan records them."""
        processor = {} if self._images is None else {"processor": self._images.identity["digest"]}
        return {**self._settings.rules(), **processor}

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files, if there is a tokenizer, to a subfolder of `folder`."""
        if self._tokenizer is not None:
            save_tokenizer(self._tokenizer, folder / "tokenizer")

    def provenance(self, plan: Plan) -> dict[str, Any]:
        """Return how the archive is made, as JSON values."""
        return {
            "model": describe_model(self.model, plan.model, self.output, predicts=self.predicts),
            "tokenizer": None if self._tokenizer is None else identify_tokenizer(self._tokenizer),
            **({} if self._images is None else {"processor": dict(self._images.identity)}),
            "dataset": {**dataset_identity(self._dataset, self._settings), **self._read},
            "command": self._request.command,
            "seed": self._settings.seed,
            **environment(),
        }

    def notes_of_archive(self) -> list[Json]:
        """Return what a reader of the archive should know, as far as it is known before the model runs."""
        return [*self.notes, *self._report.notes()]

    def cut_columns(self, layout: ProcessLayout | None) -> Mapping[str, int]:
        """Return into how many shards the columns of sites are cut; raises PlanError if there is nothing to cut."""
        if self._settings.gather:
            return {}
        if layout is None or layout.group is None:
            raise PlanError(
                f"{named('gather', False)} is for models under tensor parallelism, and this model is not: leave it out"
            )
        return column_shards(self.model, layout)
