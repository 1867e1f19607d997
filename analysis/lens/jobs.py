"""The three kinds of jobs that train a lens, as they run on a worker: sums over rows, refinement, and judgement.

A job is a few paths and numbers. It opens the archive where it runs, and gives back sums or maps, never activations.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from residua.analysis.lens.decoder import Decoder, load_decoder
from residua.analysis.lens.evaluate import Score, judge
from residua.analysis.lens.refine import refine
from residua.analysis.lens.ridge import Gram, Ridge, add_rows, solve_ridge
from residua.analysis.lens.rows import LensRows
from residua.analysis.lens.settings import LensSettings
from residua.analysis.lens.translator import Translator, read_tensors, read_translators
from residua.analysis.support.open_archives import opened

_CHOOSING_ROWS = 4096  # held-out rows that choose a ridge penalty


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every job knows.

    Attributes:
        archive: Path of the archive.
        settings: How the lens is trained.
        final: Site of the final residual stream.
        sites: Sites of this job, by depth.
        memory_limit: Bytes that the worker may take.
    """

    archive: str
    settings: LensSettings
    final: str
    sites: dict[int, str]
    memory_limit: int

    @property
    def reader(self) -> LensRows:
        """The rows."""
        return LensRows(opened(self.archive), self.settings)

    @property
    def decoder(self) -> Decoder:
        """The head, loaded once a process."""
        return _decoder(Path(self.archive) / "head", self.memory_limit)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of a site, as it is read."""
        return opened(self.archive).plan.site(self.final).row_bytes


@lru_cache(maxsize=1)
def _decoder(folder: Path, memory_limit: int) -> Decoder:
    return load_decoder(folder, memory_limit=memory_limit)


@dataclass(frozen=True, kw_only=True)
class GramTask(Task):
    """Sums over the training rows of the chunks numbered `first` to `last`."""

    origins: dict[int, torch.Tensor]
    first: int
    last: int


def sum_rows(task: GramTask) -> dict[int, Gram]:
    """Return the sums of each depth."""
    reader = task.reader
    grams = {site: Gram.zero(task.origins[depth]) for depth, site in task.sites.items()}
    rows = reader.training(reader.chunks()[task.first : task.last])
    add_rows(grams, task.final, rows, reader, task.decoder)
    return {depth: grams[site] for depth, site in task.sites.items()}


@dataclass(frozen=True, kw_only=True)
class FitTask(Task):
    """Solve the ridge of some depths from the sums in `folder`, and refine them on one share of the rows."""

    folder: str
    n_rows: int
    part: int
    n_parts: int


@dataclass(frozen=True)
class Fitted:
    """What a `FitTask` found at one depth."""

    ridge: Translator
    refined: Translator | None
    penalty: float


def fit_layers(task: FitTask) -> dict[int, Fitted]:
    """Return the maps of each depth."""
    ridges = dict(_solve(task))
    refined: dict[str, Translator] = {}
    if task.settings.refine:
        refined = refine(
            {task.sites[depth]: ridge for depth, ridge in ridges.items()},
            task.final,
            task.reader,
            task.decoder,
            task.settings,
            n_rows=task.n_rows,
            row_bytes=task.row_bytes,
            part=task.part,
            n_parts=task.n_parts,
        )
    return {
        depth: Fitted(ridge.translator, refined.get(task.sites[depth]), ridge.penalty)
        for depth, ridge in ridges.items()
    }


def gram_path(folder: str | Path, depth: int) -> Path:
    """Return the file with the sums of one depth."""
    return Path(folder) / f"sums-{depth}.safetensors"


def layer_path(folder: str | Path, depth: int) -> Path:
    """Return the file with the maps of one finished depth."""
    return Path(folder) / f"layer-{depth}.safetensors"


def _solve(task: FitTask) -> Iterator[tuple[int, Ridge]]:
    reader = task.reader
    rows = reader.judging(_CHOOSING_ROWS)
    target = task.decoder.unit(reader.read(task.final, rows).float())
    for depth, site in task.sites.items():
        gram = Gram(**read_tensors(gram_path(task.folder, depth)))
        yield depth, solve_ridge(gram, reader.read(site, rows).float(), target)


@dataclass(frozen=True, kw_only=True)
class JudgeTask(Task):
    """Compare the maps of some depths, in `folder`, on the held-out rows numbered `first` to `last`."""

    folder: str
    first: int
    last: int


def judge_layers(task: JudgeTask) -> dict[int, dict[str, Score]]:
    """Return the score of each map and of the logit lens, by depth and name."""
    reader = task.reader
    rows = reader.judging()[task.first : task.last]
    maps = {site: read_translators(layer_path(task.folder, depth)) for depth, site in task.sites.items()}
    scores = judge(maps, task.final, rows, reader, task.decoder)
    return {depth: scores[site] for depth, site in task.sites.items()}
