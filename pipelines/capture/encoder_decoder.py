"""The capture of an encoder-decoder over pairs: one pass for each stack whose rows are asked for.

The dataset is read once, as pairs. Each stack has an archive of its own in the folder `out`, which an ordinary capture
job fills, resumes and seals: with its own plan, batches and workers. The pass of the encoder ends before the decoder
runs, unless keys or values of cross-attention are asked for; the pass of the decoder runs the full model.
"""

import hashlib
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from residua.capture.forward.example_inputs import ExampleInputs, InputSource
from residua.capture.hooks.site import SiteInfo
from residua.capture.sites.frames import frame_shape, n_frame_positions, takes_frames
from residua.capture.sites.names_to_modules import resolve_sites
from residua.capture.sites.stacks import PAIR_STACKS, row_stack, stacks_of, takes_pairs
from residua.pipelines.capture.dataset_job import CaptureRequest, DatasetCapture
from residua.pipelines.capture.result import CaptureResult
from residua.pipelines.capture.stacks import run_stacks
from residua.pipelines.data.audio import FEATURES, AudioSources, Features, FrameShape, read_features
from residua.pipelines.data.dataset import SOURCE_COLUMNS, DatasetReport
from residua.pipelines.data.pairs import PairTokens, read_pairs
from residua.pipelines.data.sources import Rows
from residua.pipelines.data.tokenizer import require_special, special_ids
from residua.pipelines.images.spool import spool_folder
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.pipelines.setup.models import token_limit
from residua.store.base.canonical import Json
from residua.store.base.errors import DatasetError, PlanError
from residua.store.base.naming import named
from residua.store.examples.index import SOURCE_IDS, SOURCE_SHA256, ExampleIndex, IntArray
from residua.store.examples.table import ExampleTable
from residua.store.examples.writer import ExampleWriter
from residua.store.format.create import bring_archive
from residua.store.format.plan import STACK_RULE
from residua.store.format.sidecars import NO_LM_HEAD
from residua.store.format.stacks import making_stacks
from residua.store.storage.destination import Destination
from residua.store.storage.place import ResultPlace


def capture_pairs(model: Any, place: ResultPlace, request: CaptureRequest) -> CaptureResult:
    """Capture an encoder-decoder; the arguments are those of `capture_dataset`.

    Raises:
        PlanError: The model cannot be run on pairs of tokens, or was begun with other sites.
    """
    if request.settings.image_column is not None:
        raise PlanError(
            f"{named('image_column')} is for models over images, which an encoder-decoder is not: leave it out"
        )
    model, request = request.loaded(model, lambda found: found.main_input_name == FEATURES)
    sites = _sites_by_rows(model, request.settings)
    with making_stacks(place.out, list(sites)), spool_folder(place.out.path) as folder:
        pairs = _Pairs(model, request, folder)
        jobs = ((name, _StackCapture(name, own, pairs, place.out.inside(name))) for name, own in sites.items())
        return run_stacks(model, place, jobs, request)


def _sites_by_rows(model: PreTrainedModel, settings: CaptureSettings) -> dict[str, dict[str, SiteInfo]]:
    """Return the sites by the stack whose positions their rows are, in the order in which stacks run."""
    stacks, name = {stack.name: stack for stack in stacks_of(model)}, type(model).__name__
    if not stacks:
        raise PlanError(
            f"{name} is an encoder-decoder whose encoder and decoder are not found as models of their own: call it in "
            "your own loop inside residua.Recorder, with module: sites"
        )
    if not (takes_pairs(model) or takes_frames(stacks["encoder"].module)):
        raise PlanError(
            f"{name} is an encoder-decoder whose encoder takes {model.main_input_name}, and datasets of token ids and "
            "of audio of a fixed length are read here: call it in your own loop inside residua.Recorder"
        )
    found: dict[str, dict[str, SiteInfo]] = {stack: {} for stack in PAIR_STACKS}
    for site, info in resolve_sites(model, [settings.site_patterns]).items():
        found[row_stack(info, stacks["encoder"])][site] = info
    return {stack: infos for stack, infos in found.items() if infos}


@dataclass
class _Pairs:
    """The pairs of a dataset, read once in each process that needs them, as one example table for each stack."""

    model: PreTrainedModel
    request: CaptureRequest
    folder: Path
    report: DatasetReport | None = field(default=None, init=False)

    def write(self, stack: str, folder: Path) -> DatasetReport:
        """Write the examples of one stack to `folder`; raises DatasetError if the dataset cannot be used as asked."""
        if self.report is None:
            self.report = self._read()
        shutil.copytree(self.folder / stack, folder)
        return self.report

    @property
    def frames(self) -> FrameShape | None:
        """What the encoder takes of audio; None for one that takes tokens."""
        encoder = stacks_of(self.model)[0].module
        if not takes_frames(encoder):
            return None
        n_features, n_frames = frame_shape(encoder)
        return FrameShape(n_features=n_features, n_frames=n_frames, n_positions=n_frame_positions(encoder))

    def _audio_sources(self, rows: Rows) -> AudioSources:
        frames = cast("FrameShape", self.frames)
        return AudioSources(rows=rows, frames=frames, extractor=self.request.processor, folder=self.folder)

    def _read(self) -> DatasetReport:
        settings, tokenizer = self.request.settings, self.request.tokenizer
        require_special(settings, tokenizer)
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        limit = getattr(self.model.config, "max_target_positions", None) or token_limit(self.model)
        tokens = PairTokens(
            tokenizer=tokenizer,
            shifted=partial(_shifted, self.model),
            source_limit=None if self.frames else limit,
            target_limit=limit,
            special_ids=special_ids(tokenizer),
            source_vocab=vocabulary,
            target_vocab=int(getattr(self.model.config, "decoder_vocab_size", None) or vocabulary),
            audio_sources=self._audio_sources if self.frames else None,
        )
        report = DatasetReport()
        writers = {stack: ExampleWriter(self.folder / stack) for stack in PAIR_STACKS}
        for pair in read_pairs(self.request.dataset, settings=settings, tokens=tokens, report=report):
            writers["encoder"].add(pair.encoder)
            writers["decoder"].add(pair.decoder)
            self.request.on_example(report.n_examples, report.n_tokens)
        for writer in writers.values():
            writer.close()
        return report


class _Features:
    """Gives each example the features of its audio."""

    def __init__(self, features: Features, table: ExampleTable) -> None:
        self._features = features
        self._table = table
        self._row_of = table.table([SOURCE_COLUMNS[0]])[SOURCE_COLUMNS[0]].to_numpy()

    def of(self, example: int) -> ExampleInputs:
        """Return the features of one example, by its number in the archive."""
        features = torch.from_numpy(np.array(self._features[self._row_of[example]]))
        return ExampleInputs(input_ids=self._table.tokens(example), tensors={FEATURES: features[None]})


def _shifted(model: PreTrainedModel, labels: IntArray) -> IntArray:
    """Return the decoder's token ids for labels, by the rule of the model."""
    shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    rule: Any = vars(sys.modules[type(model).__module__]).get("shift_tokens_right")
    labels_1T = torch.from_numpy(labels.astype(np.int64))[None]
    if shift is not None:
        shifted_1T = shift(labels=labels_1T)
    elif rule is not None:  # Whisper has the rule, and no method for it
        shifted_1T = rule(labels_1T, model.config.pad_token_id, model.config.decoder_start_token_id)
    else:
        raise DatasetError(
            f"{type(model).__name__} does not say how labels become the tokens of its decoder: load it with its "
            "language modelling head, or give these tokens themselves in a column decoder_input_ids"
        )
    found: IntArray = shifted_1T[0].numpy().astype(np.int32)
    return found


class _StackCapture(DatasetCapture):
    """The capture of the rows of one stack."""

    def __init__(self, stack: str, sites: Mapping[str, SiteInfo], pairs: _Pairs, out: Destination) -> None:
        super().__init__(pairs.model, out, pairs.request, sites=sites)
        if stack == "encoder" and self._head:
            self._head = False
            self.notes.append(f"{NO_LM_HEAD}: its rows are of the encoder, and logits are of the decoder")
        self._stack = stack
        self._pairs = pairs
        self._sources: Mapping[str, Json] = {}
        self._n_source_tokens = 0

    def write_examples(self, folder: Path) -> ExampleIndex:
        """Write the stack's examples; the dataset is read by the first stack that needs them."""
        self._report = self._pairs.write(self._stack, folder)
        self.shared["dataset"] = asdict(self._report)
        self.shared["features"] = str(self._pairs.folder)
        return self._known(folder)

    def written_examples(self) -> ExampleIndex:
        """Return the examples that worker 0 wrote."""
        bring_archive(self.out)
        return self._known(self.out.path / "examples")

    def _known(self, folder: Path) -> ExampleIndex:
        """Note what the plan needs of the sources beside a decoder's examples."""
        table = ExampleTable(folder)
        index, digest, lengths = table.index(), hashlib.sha256(), list[int]()
        if SOURCE_SHA256 in table.column_types():
            for text in table.table([SOURCE_SHA256])[SOURCE_SHA256].to_pylist():
                digest.update(str(text).encode())
            self._sources = {"source": digest.hexdigest()}
        if self._stack == "decoder":
            for start in range(0, index.n_examples, 1024):
                for ids in table.lists(SOURCE_IDS, range(start, min(start + 1024, index.n_examples))):
                    digest.update(np.array([ids.size], "<i8").tobytes() + ids.astype("<i4").tobytes())
                    lengths.append(ids.size)
            self._sources = {"source": digest.hexdigest(), "longest_source": max(lengths)}
            self.longest_source, self._n_source_tokens = max(lengths), sum(lengths)
        return index

    def inputs(self, shared: Mapping[str, Any]) -> InputSource | None:
        """Return what reads the features of examples; None for an encoder that takes tokens."""
        frames = self._pairs.frames
        if frames is None:
            return None
        return _Features(read_features(Path(shared["features"]), frames), ExampleTable(self.out.path / "examples"))

    def dataset_of_plan(self, index: ExampleIndex) -> dict[str, Json]:
        """Return what the plan records of the examples, and of a decoder's sources."""
        return {**super().dataset_of_plan(index), **self._sources}

    def rules(self) -> dict[str, Json]:
        """Return the settings, and the stack that has the rows."""
        return {**super().rules(), STACK_RULE: self._stack}

    def batch_tokens(self, asked: int, index: ExampleIndex | None) -> int:
        """Return the most positions of a batch: fewer in a decoder whose sources are longer, for these run too."""
        if index is not None and self._n_source_tokens > index.total_tokens:
            asked = max(1, asked * index.total_tokens // self._n_source_tokens)
        return super().batch_tokens(asked, index)
