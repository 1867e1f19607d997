"""Training of a lens: sums, ridge regression and refinement, evaluation, each as jobs on a cluster.

1. One pass over the rows adds up what the closed form needs, for all layers together.
2. Each group of layers is solved and refined. A job depends on the archive and the settings only, so any number of
   workers gives the same lens, bit for bit, unless rows are divided. If there are more workers than layers and enough
   rows, the rows are divided into parts, a lens is trained on each, and the lenses are averaged.
3. Held-out rows decide at each layer between refinement, ridge and logit lens, and measure the result.

A job is a few paths and numbers. It opens the archive where it runs, and returns sums or maps, never activations. Every
finished layer is a file in the folder ``work``, from which a stopped training continues.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from residua.analysis.lens.checkpoint import (
    LensConfig,
    Translator,
    hash_unembedding,
    read_tensors,
    read_translators,
    write_tensors,
    write_translators,
)
from residua.analysis.lens.evaluate import REFINED, RIDGE, Score, best_map, evaluate, report_table
from residua.analysis.lens.lens_settings import LensSettings
from residua.analysis.lens.lm_head import LMHead, load_lm_head
from residua.analysis.lens.refine import refine, refine_bytes
from residua.analysis.lens.ridge import Gram, Ridge, add_rows, fit_bytes, solve_ridge
from residua.analysis.lens.rows import CHUNK_ROWS, LensPoints, LensRows, lens_points
from residua.analysis.lens.unembedding import Decoder
from residua.analysis.support.cluster import Cluster
from residua.analysis.support.device import checked_device
from residua.analysis.support.open_archives import Location, location, opened
from residua.analysis.support.sums import in_order
from residua.store.base.errors import AnalysisError
from residua.store.base.naming import named
from residua.store.format.archive_metadata import said_of
from residua.store.read.archive import Archive
from residua.store.storage.files import sweep, write_file

_SUM_CHUNKS = 512  # fewest chunks of 128 rows in one leaf of the sums
_MOST_LEAVES = 256  # of the sums: what a leaf returns is large
_LEAST_ROOM = 4 / 3  # times what one layer and the LM head take: rows, blocks of the LM head, and torch itself
_EVALUATE_ROWS = 8192  # rows in one job of the evaluation
_PENALTY_ROWS = 4096  # held-out rows that choose the penalty of the ridge regression
_WORK, _RUN_FILE = "work", "run.json"


@dataclass(frozen=True)
class _Training:
    """What all jobs of a training share.

    Attributes:
        archive: Where the archive is.
        work: Path of the folder ``work``.
        points: The sites, by layer.
        settings: How the lens is trained.
        held_out: Which examples are held out, as `LensRows` packs it.
        n_parts: Number of parts that the rows are divided into.
        memory_limit: Bytes that a worker may use.
        chunk_rows: As for `LensRows`.
    """

    archive: Location
    work: Path
    points: LensPoints
    settings: LensSettings
    held_out: npt.NDArray[np.uint8]
    n_parts: int
    memory_limit: int
    chunk_rows: int

    @property
    def reader(self) -> LensRows:
        return LensRows(opened(self.archive), self.settings, held_out=self.held_out, chunk_rows=self.chunk_rows)

    @property
    def decoder(self) -> Decoder:
        """The LM head, loaded once per process."""
        return _decoder(opened(self.archive).head, self.memory_limit // 8, self.settings.device)

    def sums_path(self, layer: int) -> Path:
        return self.work / f"sums-{layer}.safetensors"

    def layer_path(self, layer: int) -> Path:
        return self.work / f"layer-{layer}.safetensors"


@lru_cache(maxsize=1)
def _decoder(folder: Path, most_bytes: int, device: str | None) -> Decoder:
    return Decoder(load_lm_head(folder), most_bytes=most_bytes, device=checked_device(device))


def _sum_rows(
    training: _Training, origins: Mapping[int, Tensor], columns: slice, leaf_chunks: int, leaf: int
) -> dict[int, Gram]:
    """Add up the rows of one leaf for some layers, by their origins: the columns of their matrices."""
    reader, points, decoder = training.reader, training.points, training.decoder
    n_columns = len(range(points.width)[columns])
    grams = {layer: Gram.zero(origin.to(decoder.device), n_columns) for layer, origin in origins.items()}
    rows = reader.training_rows(reader.chunks()[leaf * leaf_chunks : (leaf + 1) * leaf_chunks])
    by_site = {points.sites[layer]: gram for layer, gram in grams.items()}
    add_rows(by_site, points.final, rows, reader, decoder, columns=columns)
    return {layer: Gram(*(each.cpu() for each in gram)) for layer, gram in grams.items()}


def _merge_grams(first: dict[int, Gram], second: dict[int, Gram]) -> dict[int, Gram]:
    return {layer: gram.merge_(second[layer]) for layer, gram in first.items()}


class _Fitted(NamedTuple):
    """What was found at one layer, on one part of the rows."""

    ridge: Translator
    refined: Translator | None
    penalty: float


def _fit_layers(training: _Training, job: tuple[Sequence[int], int]) -> dict[int, _Fitted]:
    """Solve the ridge regression of the layers of `job`, and refine it on the part of the rows with its number.

    If the rows are not divided, the maps are written here, and nothing is returned.
    """
    (layers, part), reader, decoder, points = job, training.reader, training.decoder, training.points
    rows = reader.held_out_rows(_PENALTY_ROWS)
    target = decoder.normalise(reader.read(points.final, rows).float())
    ridges: dict[str, Ridge] = {}
    n_rows = 0
    for layer in layers:
        site, gram = points.sites[layer], Gram(**read_tensors(training.sums_path(layer), is_mapped=False))
        ridges[site] = solve_ridge(gram, reader.read(site, rows).float(), target)
        n_rows = int(gram.n_rows.item())
        del gram  # two matrices of float64, which the refinement does not need
    refined: dict[str, Translator] = {}
    if training.settings.refine:
        refined = refine(ridges, points.final, reader, decoder, n_rows=n_rows, part=part, n_parts=training.n_parts)
    fitted = {
        layer: _Fitted(ridge.translator, refined.get(site), ridge.penalty)
        for layer, (site, ridge) in zip(layers, ridges.items(), strict=True)
    }
    if training.n_parts > 1:
        return fitted
    for layer, one in fitted.items():
        _write_layer(training, layer, [one])
    return {}


def _write_layer(training: _Training, layer: int, by_part: Sequence[_Fitted]) -> None:
    refined = [each.refined for each in by_part if each.refined is not None]
    maps = {RIDGE: by_part[0].ridge} | ({REFINED: Translator.mean(refined)} if refined else {})
    write_translators(training.layer_path(layer), maps, penalty=by_part[0].penalty)


def _evaluate_layers(training: _Training, job: tuple[Sequence[int], int]) -> dict[int, dict[str, Score]]:
    """Score the maps of the layers of `job`, by name, on held-out rows from its number on."""
    (layers, first), reader, points = job, training.reader, training.points
    rows = reader.held_out_rows()[first : first + _EVALUATE_ROWS]
    maps = {points.sites[layer]: read_translators(training.layer_path(layer))[0] for layer in layers}
    scores = evaluate(maps, points.final, rows, reader, training.decoder)
    return dict(zip(layers, scores.values(), strict=True))


class LensTraining:
    """One training of one lens in one folder. Continues an earlier training of the same lens that was stopped there.

    Args:
        archive: The archive.
        out: Folder for the lens.
        sites: Patterns of sites, or None for all.
        settings: The settings.
        cluster: Where the jobs run.
        rows_per_part: Fewest rows in one part when the number of parts is not set. With two parts of 68,000 rows the KL
            divergence was 0.4 % higher on the shipped model, with four of 34,000 rows 1.5 %.
        sums_share: One in how many bytes of a worker's memory the sums of one leaf may take.
        origin_chunks: From how many chunks the origin of the sums is estimated; 0: it is zero.
        chunk_rows: Rows that are chosen together, unless a shard has fewer.

    Raises:
        AnalysisError: The archive lacks what is needed, or the folder holds a lens of other settings.
        UnknownSiteError: A pattern matches no stored site.
    """

    def __init__(
        self,
        archive: Archive,
        out: Path,
        *,
        sites: str | Iterable[str] | None = None,
        settings: LensSettings,
        cluster: Cluster,
        rows_per_part: int = 100_000,
        sums_share: int = 16,
        origin_chunks: int = 8,
        chunk_rows: int = CHUNK_ROWS,
    ) -> None:
        self._archive = opened(location(archive))
        self._cluster = cluster
        self._sums_share, self._origin_chunks = sums_share, origin_chunks
        self._out = out.absolute()
        self._work = self._out / _WORK
        self._points = lens_points(archive, sites)
        archive.refuse_losses({*self._points.sites.values(), self._points.final}, "a lens")
        self._reader = LensRows(self._archive, settings, chunk_rows=chunk_rows)
        self._check_size(settings)
        if settings.device is not None:
            list(cluster.map(checked_device, [settings.device], label="looking for the device"))
        n_parts = self._start(settings, settings.parts or self._default_parts(settings, rows_per_part))
        where, limit = location(archive), cluster.memory_limit
        held_out = self._reader.held_out
        self._training = _Training(where, self._work, self._points, settings, held_out, n_parts, limit, chunk_rows)

    def train(self) -> None:
        """Find the maps of all unfinished layers."""
        left = [layer for layer in self._points.sites if not self._training.layer_path(layer).is_file()]
        if left:
            self._sum(left)
            self._fit(left)

    def evaluate(self) -> tuple[LMHead, dict[int, Translator], LensConfig, pa.Table]:
        """Evaluate the maps on held-out rows, and keep the best one of each layer.

        Returns:
            The arguments of `residua.analysis.lens.lens.TunedLens`.
        """
        files = {layer: read_translators(self._training.layer_path(layer)) for layer in self._points.sites}
        scores = self._scores()
        identity = Translator.identity(self._points.width)
        kept = {layer: maps.get(best_map(scores[layer]), identity) for layer, (maps, _) in files.items()}
        copies = {layer: Translator(weight.clone(), bias.clone()) for layer, (weight, bias) in kept.items()}
        penalties = {layer: penalty for layer, (_, penalty) in files.items()}
        head = load_lm_head(self._archive.head)
        return head, copies, self._config(head), report_table(self._points.sites, scores, penalties)

    def clear(self) -> None:
        """Remove the folder ``work``, once the lens is written."""
        for path in self._work.iterdir():
            if path.name != _RUN_FILE:  # removed last: without it, a later run would not recognise the folder
                path.unlink()
        shutil.rmtree(self._work)

    def _start(self, settings: LensSettings, n_parts: int) -> int:
        """Begin or continue the work in the folder; returns the number of parts that the rows are divided into."""
        path = self._work / _RUN_FILE
        wanted = {
            "archive": self._archive.plan.digest,
            "captured_shards": len(self._archive.commits),
            "sites": list(self._points.sites.values()),
            "final": self._points.final,
            **{name: value for name, value in asdict(settings).items() if name != "device"},
        }
        if not path.is_file():
            if not self._is_unused():
                raise AnalysisError(
                    f"{self._out} is not empty, and holds no unfinished lens: choose another {named('out')}, or look "
                    f"at a finished one (residua lens show {self._out})"
                )
            write_file(path, [json.dumps({**wanted, "split_in": n_parts}, indent=2).encode()])
            return n_parts
        found: dict[str, Any] = json.loads(path.read_bytes())
        n_parts = int(found.pop("split_in", 1))
        different = sorted(name for name in wanted if found.get(name) != wanted[name])
        if different:
            raise AnalysisError(
                f"{self._out} holds an unfinished lens with another {' and '.join(different)}: give the same settings "
                f"to continue it, or choose another {named('out')}"
            )
        sweep(self._work)
        return n_parts

    def _check_size(self, settings: LensSettings) -> None:
        """Raise AnalysisError if there are too few rows for the width, or too little memory for one layer."""
        width, n_rows = self._points.width, self._reader.estimated_training_rows()
        if n_rows < width:
            raise AnalysisError(
                f"about {n_rows:,} rows are there to train a lens on, too few for width {width:,}: a map has as many "
                f"numbers for each output as there are channels, and some times as many rows tell it from the logit "
                f"lens. Use more rows ({named('rows')}), or capture more"
            )
        head = load_lm_head(self._archive.head)
        head_bytes = sum(each.nbytes for each in head.parameters.values())
        n_candidates = settings.n_candidates(head.vocabulary_size)
        refinement = refine_bytes(width, head.vocabulary_size, n_candidates, settings.batch_rows)
        closed_form = fit_bytes(width, len(self._reader.held_out_rows(_PENALTY_ROWS)))
        most = max(closed_form, refinement if settings.refine and settings.device is None else 0)
        needed = int((most + head_bytes) * _LEAST_ROOM)
        if needed > self._cluster.memory_limit:
            has = self._cluster.memory_limit / 2**30
            raise AnalysisError(
                f"a lens of width {width:,} with an LM head of {head_bytes / 2**30:.1f} GiB needs "
                f"{needed / 2**30:.1f} GiB for each worker, but a worker has {has:.1f} GiB: allow more "
                f"({named('memory_limit', f'{-(-needed // 2**30)}GiB')})"
            )

    def _default_parts(self, settings: LensSettings, rows_per_part: int) -> int:
        """Return the number of workers per layer, or less if the parts would have too few rows."""
        if not settings.refine:
            return 1
        workers_per_layer = self._cluster.n_workers // len(self._points.sites)
        return max(1, min(workers_per_layer, self._reader.estimated_training_rows() // rows_per_part))

    def _is_unused(self) -> bool:
        """Whether the folder is empty, or holds only what a run leaves that was killed at its start."""
        if self._out.is_dir() and any(path != self._work for path in self._out.iterdir()):
            return False
        sweep(self._work)
        return not any(self._work.glob("*"))

    def _groups(self, layers: list[int], layer_bytes: int, most: int) -> list[list[int]]:
        """Divide layers evenly into groups, one per job: at least one for each worker, each within its memory."""
        per_worker = -(-len(layers) // self._cluster.n_workers)
        size = max(1, min(most, per_worker, self._cluster.memory_limit // 4 // layer_bytes))
        return [group.tolist() for group in np.array_split(np.array(layers), -(-len(layers) // size))]

    def _sum(self, layers: list[int]) -> None:
        """Write the sums of `layers`, for as many layers or columns at a time as fit into memory."""
        left = [layer for layer in layers if not self._training.sums_path(layer).is_file()]
        width, room = self._points.width, max(1, self._cluster.memory_limit // self._sums_share)
        n_layers = max(1, room // (2 * 8 * width**2))
        n_columns = width if n_layers > 1 else max(1, min(width, room // (2 * 8 * width)))
        n_chunks = len(self._reader.chunks())
        leaf_chunks = max(_SUM_CHUNKS, -(-n_chunks // _MOST_LEAVES))
        training = self._cluster.send(self._training)
        for start in range(0, len(left), n_layers):
            origins = {layer: self._origin(self._points.sites[layer]) for layer in left[start : start + n_layers]}
            found = [
                self._cluster.sum(
                    _sum_rows,
                    [training, origins, slice(column, min(column + n_columns, width)), leaf_chunks],
                    -(-n_chunks // leaf_chunks),
                    merge=_merge_grams,
                    label="adding up rows",
                    term_bytes=2 * 8 * width * n_columns * len(origins),
                )
                for column in range(0, width, n_columns)
            ]
            for layer in origins:
                total = Gram.joined([grams.pop(layer) for grams in found])
                write_tensors(self._training.sums_path(layer), total._asdict())

    def _origin(self, site: str) -> Tensor:
        rows = self._reader.training_rows(self._reader.chunks()[: self._origin_chunks])
        return self._reader.read(site, rows).double().mean(0) if len(rows) else torch.zeros(self._points.width)

    def _fit(self, layers: list[int]) -> None:
        n_rows = int(read_tensors(self._training.sums_path(layers[0]))["n_rows"].item())
        rows_bytes = min(2**28, n_rows * self._archive.plan.site(self._points.final).row_bytes)
        n_parts, settings = self._training.n_parts, self._training.settings
        groups = self._groups(layers, rows_bytes + 8 * 4 * self._points.width**2, settings.together)
        jobs = [(group, part) for group in groups for part in range(n_parts)]
        fitted: dict[int, dict[int, _Fitted]] = {layer: {} for layer in layers}
        for number, found in self._cluster.map(partial(_fit_layers, self._training), jobs, label="fitting layers"):
            for layer, of_part in found.items():
                fitted[layer][number % n_parts] = of_part
                if len(fitted[layer]) == n_parts:
                    by_part = fitted.pop(layer)
                    _write_layer(self._training, layer, [by_part[part] for part in sorted(by_part)])

    def _scores(self) -> dict[int, dict[str, Score]]:
        """Return the score of each map, by layer and name."""
        layers, n_rows = list(self._points.sites), len(self._reader.held_out_rows())
        layer_bytes = 3 * 4 * self._points.width**2 + 2 * _EVALUATE_ROWS * 4 * self._points.width
        groups = self._groups(layers, layer_bytes, len(layers))
        jobs = [(group, first) for group in groups for first in range(0, n_rows, _EVALUATE_ROWS)]
        totals: dict[int, dict[str, Score]] = {layer: {} for layer in layers}
        found = self._cluster.map(partial(_evaluate_layers, self._training), jobs, label="evaluating layers")
        for by_layer in in_order(found):
            for layer, scores in by_layer.items():
                for name, score in scores.items():
                    totals[layer][name] = totals[layer].get(name, Score()).plus(score)
        return totals

    def _config(self, head: LMHead) -> LensConfig:
        known = said_of("model", self._archive.provenance)
        return LensConfig(
            base_model_name_or_path=str(known.get("id") or known.get("class") or "unknown"),
            base_model_revision=known.get("revision"),
            d_model=self._points.width,
            num_hidden_layers=self._points.n_blocks,
            unembed_hash=hash_unembedding(head.parameters["unembed.weight"]),
        )
