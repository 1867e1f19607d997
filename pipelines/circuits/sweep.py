"""Sweeps over sites and positions of pairs: what is asked, and the job that patching and its estimate share."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from residua.capture.patching.pairs import Pair, PairMetric, pair_metric
from residua.capture.patching.patching import Cell, Patcher, Swept
from residua.capture.runtime.wrappers import running_uncompiled
from residua.capture.sites.shape_probe import evaluating
from residua.pipelines.circuits.pairs import PairSource, read_pairs
from residua.pipelines.circuits.sweep_picture import draw_sweep
from residua.pipelines.jobs.sharing import SharedWork
from residua.pipelines.jobs.workers import working_together
from residua.pipelines.replay.result_folder import write_table
from residua.pipelines.setup.models import named_model
from residua.pipelines.setup.settings import CaptureSettings
from residua.store.base.canonical import digest_of
from residua.store.base.errors import PlanError
from residua.store.read.archive import Archive

TABLE, PICTURE = "cells.parquet", "cells.png"


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What a sweep looks at, and where it runs.

    Attributes:
        sites: Names or patterns of sites, the rows of the grid.
        positions: Positions, its columns, negative ones from the end; each by itself unless given. ``together`` patches
            all of them at once.
        heads: Whether each head is a cell of its own, at z, q, k and v.
        metric: What is measured behind the last position: ``logit_difference`` (answer minus wrong), ``loss`` (of the
            answer), ``probability`` (of the answer) or ``kl`` (from the clean run).
        device: Device of the model, if it is loaded here.
        tp: Over how many processes it is then split by tensor parallelism.
        pp: Over how many it is split as a pipeline.
    """

    sites: str | Collection[str] = "resid_post.*"
    positions: Sequence[int] | Literal["together"] | None = None
    heads: bool = False
    metric: str = "logit_difference"
    device: str = "auto"
    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        pair_metric(self.metric)
        if isinstance(self.positions, str) and self.positions != "together":
            raise PlanError(f"positions is {self.positions!r}: give numbers, or together for all of them at once")

    def places(self, pair: Pair, number: int) -> Sequence[int | None]:
        """Return the positions of one pair; None stands for all of them together.

        Raises:
            PlanError: It has no such position.
        """
        length = len(pair.clean)
        if isinstance(self.positions, str):
            return [None]
        if self.positions is None:
            return list(range(length))
        wrong = [position for position in self.positions if not -length <= position < length]
        if wrong or not self.positions:
            raise PlanError(
                f"pair {number} has {length} tokens: there is no position {wrong[0] if wrong else 'chosen'}"
            )
        return sorted({position % length for position in self.positions})


class Way(NamedTuple):
    """A way to fill the cells of a pair, and its title."""

    title: str
    fill: Callable[[Patcher, Pair, list[Cell], PairMetric], Swept]


class Sweep:
    """What is swept over.

    Args:
        model: A transformers model, or a hub id or folder of one.
        pairs: As `read_pairs` takes them.
        settings: The grid.
        tokenizer: Tokenizer of a model that is passed as an object, for texts.
        archive: Where examples that are named by number lie.
    """

    def __init__(
        self,
        model: str | PathLike[str] | PreTrainedModel,
        pairs: PairSource,
        settings: SweepSettings,
        *,
        tokenizer: PreTrainedTokenizerBase | None,
        archive: Archive | str | PathLike[str] | None,
    ) -> None:
        self._model = model
        self._source = pairs
        self._settings = settings
        self._tokenizer = tokenizer
        self._archive = archive if isinstance(archive, Archive | None) else Archive(archive)

    def run(self, way: Way, out: Path | None, on_pair: Callable[[int, int], None]) -> pa.Table:
        """Return one line a cell of every pair; in `out` table and picture, if it is given."""
        asked = self._settings
        settings = CaptureSettings(device=asked.device, tp=asked.tp, pp=asked.pp)
        with working_together(out, settings) as membership:
            model, tokenizer = named_model(self._model, self._tokenizer, settings)
            pairs = read_pairs(self._source, model, tokenizer=tokenizer, archive=self._archive)
            patcher = Patcher(model, asked.sites, by_head=asked.heads)
            places = [asked.places(pair, number) for number, pair in enumerate(pairs, start=1)]
            cells = [patcher.cells(those) for those in places]
            shared = SharedWork(membership, model, alike=False)
            grid = {"places": [list(those) for those in places], "heads": asked.heads}
            content = digest_of({"pairs": [asdict(pair) for pair in pairs], **grid})
            shared.agree_on({"pairs": content, "sites": patcher.sites, "metric": asked.metric, "way": way.title})

            def find(number: int) -> dict[str, Any]:
                return asdict(way.fill(patcher, pairs[number], cells[number], pair_metric(asked.metric)))

            def close(found: list[Mapping[str, Any]]) -> None:
                if out is not None:
                    write_table(out / TABLE, _table(pairs, cells, found))
                    title = f"{way.title}: {asked.metric.replace('_', ' ')}"
                    draw_sweep(out / PICTURE, _table(pairs, cells, found), title, pairs, tokenizer)

            with running_uncompiled(model), evaluating(model):
                found = shared.found(len(pairs), find, close=close, on_unit=on_pair)
        return _table(pairs, cells, found)


def _table(pairs: Sequence[Pair], cells: Sequence[list[Cell]], found: Sequence[Mapping[str, Any]]) -> pa.Table:
    lines = [
        line
        for number, (pair, those, values) in enumerate(zip(pairs, cells, found, strict=True))
        for line in _lines(number, pair, those, Swept(**values))
    ]
    whole, text = dict.fromkeys(("pair", "position", "head", "token"), pa.int64()), {"site": pa.string()}
    types = {name: {**whole, **text}.get(name, pa.float64()) for name in lines[0]}
    return pa.Table.from_pylist(lines, schema=pa.schema(list(types.items())))


def _lines(number: int, pair: Pair, cells: list[Cell], found: Swept) -> list[dict[str, Any]]:
    way = found.clean - found.corrupted
    return [
        {
            "pair": number,
            "site": cell.site,
            "position": cell.position,
            **({} if cell.head is None else {"head": cell.head}),
            "token": None if cell.position is None else pair.corrupted[cell.position],
            "clean": found.clean,
            "corrupted": found.corrupted,
            "value": value,
            "effect": value - found.corrupted,
            "recovered": (value - found.corrupted) / way if way else None,
        }
        for cell, value in zip(cells, found.values, strict=True)
    ]
