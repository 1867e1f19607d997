"""The story of training a lens: sums, ridge and refinement, judgement, each as jobs on a cluster.

1. One pass over the rows adds up what the closed form needs, for all layers at once.
2. Each group of layers is solved and refined. What a job depends on is fixed by archive and settings, so any number of
   workers gives the same lens, bit for bit, as long as rows are not split: where there are workers to spare, and rows
   enough for each of them, they are, and the lenses averaged.
3. Held-out rows decide at each layer between refinement, ridge and logit lens, and say how good it is.

Every finished layer is a file in the folder ``work``; a run that was stopped goes on from there.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from residua.analysis.lens.checkpoint import LensConfig, hash_unembedding
from residua.analysis.lens.evaluate import Score
from residua.analysis.lens.jobs import (
    FitTask,
    Fitted,
    GramTask,
    JudgeTask,
    fit_layers,
    gram_path,
    judge_layers,
    layer_path,
    sum_rows,
)
from residua.analysis.lens.lm_head import Head, load_head
from residua.analysis.lens.points import points_of
from residua.analysis.lens.report import REFINED, RIDGE, best_map, report_table
from residua.analysis.lens.ridge import Gram
from residua.analysis.lens.rows import LensRows
from residua.analysis.lens.settings import LensSettings
from residua.analysis.lens.translator import (
    Translator,
    read_tensors,
    read_translators,
    write_tensors,
    write_translators,
)
from residua.analysis.support.cluster import Cluster
from residua.analysis.support.open_archives import address, opened
from residua.store.base.errors import AnalysisError
from residua.store.read.archive import Archive
from residua.store.storage.files import sweep, write_file

_RUN_CHUNKS = 512  # of 128 rows: one job of sums
_RUN_ROWS = 8192  # one job of judgement
_ORIGIN_CHUNKS = 8
_PART_ROWS = 100_000  # on the shipped model, two parts of 68,000 rows cost 0.4 % of the KL, four of 34,000 1.5 %
_WORK, _RUN_FILE = "work", "run.json"


class LensParts(NamedTuple):
    """What makes up a trained lens; see `residua.analysis.lens.lens.TunedLens`."""

    head: Head
    translators: dict[int, Translator]
    config: LensConfig
    report: pa.Table


class LensTraining:
    """One training of one lens in one folder, which it may share with an earlier run that was stopped.

    Args:
        archive: The archive.
        out: Folder for everything.
        sites: Patterns of sites, or None for all.
        settings: How.
        cluster: Where.

    Raises:
        AnalysisError: The archive lacks what is needed, or the folder holds a lens of other settings.
        UnknownSiteError: `sites` names no stored site.
    """

    def __init__(
        self,
        archive: Archive,
        out: Path,
        *,
        sites: str | Iterable[str] | None = None,
        settings: LensSettings | None = None,
        cluster: Cluster,
    ) -> None:
        self._settings = settings or LensSettings()
        self._points = points_of(archive, sites)
        self._archive = opened(address(archive))
        self._reader = LensRows(self._archive, self._settings)
        self._cluster = cluster
        self._out = out.absolute()
        self._work = self._out / _WORK
        self._n_parts = self._begin()

    def train(self) -> None:
        """Find the maps of all layers that are not finished yet."""
        left = [depth for depth in self._points.sites if not layer_path(self._work, depth).is_file()]
        if left:
            n_rows = self._sum(left)
            self._fit(left, n_rows)

    def judge(self) -> LensParts:
        """Judge the maps on held-out rows, and keep the best at each layer."""
        maps = {depth: read_translators(layer_path(self._work, depth)) for depth in self._points.sites}
        scores = self._judge()
        penalties = {depth: read_tensors(layer_path(self._work, depth))["penalty"].item() for depth in maps}
        identity = Translator.identity(self._points.width)
        kept = {depth: named.get(best_map(scores[depth]), identity).copy() for depth, named in maps.items()}
        head = load_head(self._archive.path / "head")
        return LensParts(head, kept, self._config(head), report_table(self._points.sites, scores, penalties))

    def clear(self) -> None:
        """Remove what only going on would need; the lens is written."""
        for path in self._work.iterdir():
            if path.name != _RUN_FILE:  # it goes last: without it, nothing would take up what a kill leaves
                path.unlink()
        shutil.rmtree(self._work)

    def _begin(self) -> int:
        """Take up or begin the work in the folder; returns into how many parts the rows are split."""
        path = self._work / _RUN_FILE
        n_parts = self._settings.parts or self._spare_parts()
        wanted = {
            "archive": self._archive.plan.digest,
            "captured_shards": len(self._archive.commits),
            "sites": list(self._points.sites.values()),
            "final": self._points.final,
            **self._settings.to_json(),
        }
        if not path.is_file():
            if not self._is_untouched():
                raise AnalysisError(
                    f"{self._out} is not empty, and holds no unfinished lens: choose another --out, or look at a "
                    f"finished one (residua lens show {self._out})"
                )
            write_file(path, [json.dumps({**wanted, "split_in": n_parts}, indent=2).encode()])
            return n_parts
        found: dict[str, Any] = json.loads(path.read_bytes())
        n_parts = int(found.pop("split_in", 1))
        different = sorted(name for name in wanted if found.get(name) != wanted[name])
        if different:
            raise AnalysisError(
                f"{self._out} holds an unfinished lens with another {' and '.join(different)}: give the same settings "
                "to go on with it, or choose another --out"
            )
        sweep(self._work)
        return n_parts

    def _spare_parts(self) -> int:
        """Return into how many parts the workers that no layer needs split the rows, each with enough of them."""
        if not self._settings.refine:
            return 1
        spare = self._cluster.n_workers // len(self._points.sites)
        return max(1, min(spare, self._reader.n_chosen() // _PART_ROWS))

    def _is_untouched(self) -> bool:
        """Say whether the folder holds nothing, or only what a run leaves that is killed as it begins."""
        if self._out.is_dir() and any(path != self._work for path in self._out.iterdir()):
            return False
        sweep(self._work)
        return not any(self._work.glob("*"))

    def _task(self, depths: Iterable[int]) -> dict[str, Any]:
        """What every job is told."""
        return {
            "archive": str(self._archive.path),
            "settings": self._settings,
            "final": self._points.final,
            "sites": {depth: self._points.sites[depth] for depth in depths},
            "memory_limit": self._cluster.memory_limit,
        }

    def _groups(self, depths: list[int], bytes_each: int, most: int) -> list[list[int]]:
        """Divide layers evenly into groups of which one job takes each: for every worker, and within its memory."""
        fair = -(-len(depths) // self._cluster.n_workers)
        size = max(1, min(most, fair, self._cluster.memory_limit // 4 // bytes_each))
        return [group.tolist() for group in np.array_split(np.array(depths), -(-len(depths) // size))]

    def _sum(self, depths: list[int]) -> int:
        """Write the sums of `depths`; returns the training rows."""
        n_chunks = len(self._reader.chunks())
        left = [depth for depth in depths if not gram_path(self._work, depth).is_file()]
        runs = [(start, min(start + _RUN_CHUNKS, n_chunks)) for start in range(0, n_chunks, _RUN_CHUNKS)]
        fitting = max(1, self._cluster.memory_limit // 16 // (2 * 8 * self._points.width**2))
        for group in (left[start : start + fitting] for start in range(0, len(left), fitting)):
            self._sum_group(group, runs)
        return int(read_tensors(gram_path(self._work, depths[0]))["n_rows"].item())

    def _sum_group(self, group: list[int], runs: list[tuple[int, int]]) -> None:
        origins = {depth: self._origin(self._points.sites[depth]) for depth in group}
        tasks = [GramTask(**self._task(group), origins=origins, first=first, last=last) for first, last in runs]
        totals = {depth: Gram.zero(origins[depth]) for depth in group}
        for sums in in_order(self._cluster.map(sum_rows, tasks, label="adding up rows")):
            for depth, gram in sums.items():
                totals[depth].merge_(gram)
        for depth, gram in totals.items():
            write_tensors(gram_path(self._work, depth), gram._asdict())

    def _origin(self, site: str) -> Tensor:
        rows = self._reader.training(self._reader.chunks()[:_ORIGIN_CHUNKS])
        return self._reader.read(site, rows).double().mean(0) if len(rows) else torch.zeros(self._points.width)

    def _fit(self, depths: list[int], n_rows: int) -> None:
        width, row_bytes = self._points.width, self._archive.plan.site(self._points.final).row_bytes
        most_rows = min(2**28, n_rows * row_bytes)
        groups = self._groups(depths, most_rows + 8 * 4 * width**2, self._settings.together)
        tasks = [
            FitTask(**self._task(group), folder=str(self._work), n_rows=n_rows, part=part, n_parts=self._n_parts)
            for group in groups
            for part in range(self._n_parts)
        ]
        shares: dict[int, dict[int, Fitted]] = {depth: {} for depth in depths}
        for number, found in self._cluster.map(fit_layers, tasks, label="fitting layers"):
            for depth, fitted in found.items():
                shares[depth][tasks[number].part] = fitted
                if len(shares[depth]) == self._n_parts:
                    self._write_layer(depth, shares.pop(depth))

    def _write_layer(self, depth: int, shares: Mapping[int, Fitted]) -> None:
        parts = [shares[part] for part in range(self._n_parts)]
        refined = [part.refined for part in parts if part.refined is not None]
        maps = {RIDGE: parts[0].ridge} | ({REFINED: Translator.mean(refined)} if refined else {})
        write_translators(layer_path(self._work, depth), maps, penalty=parts[0].penalty)

    def _judge(self) -> dict[int, dict[str, Score]]:
        depths, n_rows = list(self._points.sites), len(self._reader.judging())
        bytes_each = 3 * 4 * self._points.width**2 + 2 * _RUN_ROWS * 4 * self._points.width
        tasks = [
            JudgeTask(**self._task(group), folder=str(self._work), first=first, last=min(first + _RUN_ROWS, n_rows))
            for group in self._groups(depths, bytes_each, len(depths))
            for first in range(0, n_rows, _RUN_ROWS)
        ]
        totals: dict[int, dict[str, Score]] = {depth: {} for depth in depths}
        for scores in in_order(self._cluster.map(judge_layers, tasks, label="judging on held-out rows")):
            for depth, named in scores.items():
                for name, score in named.items():
                    totals[depth][name] = totals[depth].get(name, Score()).plus(score)
        return totals

    def _config(self, head: Head) -> LensConfig:
        model = self._archive.provenance.get("model")
        known: Mapping[str, Any] = model if isinstance(model, Mapping) else {}
        return LensConfig(
            base_model_name_or_path=str(known.get("id") or known.get("class") or "unknown"),
            base_model_revision=known.get("revision"),
            d_model=self._points.width,
            num_hidden_layers=self._points.n_blocks,
            unembed_hash=hash_unembedding(head.parameters["unembed.weight"]),
        )


def in_order(results: Iterator[tuple[int, Any]]) -> Iterator[Any]:
    """Yield results in the order of their jobs: sums depend on it in their last bits."""
    waiting: dict[int, Any] = {}
    numbers = count()
    wanted = next(numbers)
    for number, result in results:
        waiting[number] = result
        while wanted in waiting:
            yield waiting.pop(wanted)
            wanted = next(numbers)
