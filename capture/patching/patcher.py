"""Activation patching and its linear estimate: which sites, positions and heads carry the difference of two examples.

Patching runs the corrupted example once for each cell of a grid, with the value of the clean run at that cell (Vig et
al. 2020; Meng et al. 2022; by head: Wang et al. 2022). Cells share forward passes, a copy of the example each. Below
their lowest cell all copies are alike: they start from the residual stream of the corrupted run, and the blocks there
are skipped.

Attribution patching (Nanda 2023; Syed, Rager and Conmy 2023) estimates the same as the gradient in the corrupted run
times the difference of the two runs' values: all cells for two forward passes and one backward pass.

Legend: `C` copies of the example in a batch, `T` positions, `V` vocabulary.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from residua.capture.forward.inputs import forward_kwargs
from residua.capture.hooks.site import SiteInfo
from residua.capture.patching.pair import Pair, PairMetric
from residua.capture.replay.start import Skip, skip_below, skipping
from residua.capture.runtime.collectives import all_gather_objects
from residua.capture.runtime.devices import input_device
from residua.capture.runtime.process_groups import pipeline_group
from residua.capture.runtime.wrappers import core_of
from residua.capture.sites.anatomy import ATTENTION_KINDS
from residua.capture.sites.pipeline_stages import is_placeholder
from residua.capture.sites.reference_model import unsharded_anatomy, unsharded_sites
from residua.capture.taps.pipeline_gradients import carrying_gradients, end_here
from residua.capture.taps.tap import tap
from residua.store.base.errors import CaptureError, PlanError, UnknownSiteError

_LEAST_TOKENS, _LEAST_TOKENS_GPU = 256, 4_096  # of a pass: with fewer, calling the model takes as long as the work


class Cell(NamedTuple):
    """What is patched at once.

    Attributes:
        site: A site.
        position: A position there; None for all of them together.
        head: A head there; None for the full row.
    """

    site: str
    position: int | None
    head: int | None = None

    @property
    def at(self) -> tuple[slice | int, slice | int]:
        """The index of the cell in a (T, heads, ...) tensor."""
        everything = slice(None)
        return (
            everything if self.position is None else self.position,
            everything if self.head is None else self.head,
        )


@dataclass(frozen=True, kw_only=True)
class PatchedPair:
    """The results for one pair.

    Attributes:
        clean: The metric of the clean run.
        corrupted: The metric of the corrupted run.
        values: The metric with each cell patched, or its estimate, in the order of the cells.
    """

    clean: float
    corrupted: float
    values: list[float]


class Patcher:
    """Patches the runs of one model.

    Args:
        model: A language model, in evaluation mode.
        sites: Names or patterns of the sites whose cells are patched.
        by_head: Whether each head is a cell of its own.

    Attributes:
        sites: Their names, in the model's order.

    Raises:
        UnknownSiteError: The model has no such site.
        PlanError: A site does not hold one entry per token, or has no heads although `by_head` asks for them.
    """

    def __init__(self, model: nn.Module, sites: str | Iterable[str], *, by_head: bool = False) -> None:
        self._model = model
        infos = unsharded_sites(core_of(model), [sites] if isinstance(sites, str) else list(sites))
        for name, info in infos.items():
            if not info.per_token or info.site.top is not None or info.site.kind == "pattern":
                raise PlanError(f"{name} does not hold one entry per token that could be put in; choose another site")
            if by_head and info.site.kind not in ATTENTION_KINDS:
                raise PlanError(f"{name} has no heads that could be patched one by one; z, q, k and v have")
        self.sites = tuple(infos)
        self._infos = infos
        self._anatomy = unsharded_anatomy(model)
        self._streams = {} if self._anatomy is None else _streams(model)
        self._n_heads = {name: (info.row_shape or (0,))[0] or 0 for name, info in infos.items()} if by_head else {}
        # without these sites, the LM head may run on the last position alone
        self._needs_logits = any(info.site.kind in ("module", "logits") for info in infos.values())

    def cells(self, positions: Sequence[int | None]) -> list[Cell]:
        """Return the grid of all sites and some positions; None stands for all positions together."""
        return [
            Cell(site, position, head)
            for site in self.sites
            for position in positions
            for head in (range(self._n_heads[site]) if self._n_heads else [None])
        ]

    def patch(self, pair: Pair, cells: Sequence[Cell], metric: PairMetric, *, batch_cells: int) -> PatchedPair:
        """Measure the corrupted run with the clean value at each cell, `batch_cells` cells in one forward pass."""
        with torch.no_grad():
            clean, values = self._read(pair.clean, self._infos)
            batches = self._batches(cells, batch_cells, len(pair.clean))
            starts = [self._start_of(batch) for batch in batches]
            tops = {start.info.name: start.info for start in starts if start is not None}
            corrupted, streams = self._read(pair.corrupted, tops)
            patched: list[float] = []
            for batch, start in zip(batches, starts, strict=True):
                logits_CV = self._patched_logits(pair, batch, values, start, streams)
                patched += metric(logits_CV, pair, clean[0]).tolist()
            ends = [float(metric(logits, pair, clean[0])) for logits in (clean, corrupted)]
        return PatchedPair(clean=ends[0], corrupted=ends[1], values=patched)

    def attribute(self, pair: Pair, cells: Sequence[Cell], metric: PairMetric) -> PatchedPair:
        """Estimate `patch` from one backward pass: the gradient at each cell times the difference of the runs.

        If several processes hold the model, the first one has the values.
        """
        with torch.no_grad():
            clean, wanted = self._read(pair.clean, self._infos)
        values: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        with (
            torch.enable_grad(),
            carrying_gradients(self._model),
            _differentiable(self._model) as embedded,
            tap(self._model, self._infos, values.__setitem__),
            tap(self._model, self._infos, gradients.__setitem__, backward=True),
        ):
            corrupted = metric(self._logits(pair.corrupted, 1), pair, clean[0])
            # only with respect to the last embedding output: no parameter accumulates gradients, and attaching the
            # taps may have run the model before
            torch.autograd.grad(corrupted.sum(), [*embedded[-1:], *end_here(self._model)])
        effects_here = {
            name: _effects((wanted[name] - values[name])[0], gradient[0], [c for c in cells if c.site == name])
            for name, gradient in gradients.items()
        }
        stages = all_gather_objects(pipeline_group(self._model), effects_here)
        effects = {name: of_cells for stage in stages for name, of_cells in stage.items()}
        base = float(corrupted.detach())
        return PatchedPair(
            clean=float(metric(clean, pair, clean[0])),
            corrupted=base,
            values=[base + effects[cell.site][cell] for cell in cells if cell.site in effects],
        )

    def _read(self, ids: Sequence[int], sites: Mapping[str, SiteInfo]) -> tuple[Tensor, dict[str, Tensor]]:
        """Run an example; return its logits, (1, V), and the values of sites."""
        values: dict[str, Tensor] = {}
        with tap(self._model, sites, values.__setitem__) if sites else nullcontext():
            logits = self._logits(ids, 1)
        return logits, values

    def _batches(self, cells: Sequence[Cell], batch_cells: int, n_tokens: int) -> list[list[Cell]]:
        """Divide the cells into those of each pass: a pass that is large enough ends where the next can start higher.

        Args:
            cells: The cells, in the model's order.
            batch_cells: Most cells of a pass.
            n_tokens: Tokens of the example.
        """
        least = (_LEAST_TOKENS if input_device(core_of(self._model)).type == "cpu" else _LEAST_TOKENS_GPU) / n_tokens
        batches: list[list[Cell]] = []
        for cell in cells:
            differs = bool(batches) and self._block(cell) != self._block(batches[-1][0])
            if not batches or len(batches[-1]) == batch_cells or (differs and len(batches[-1]) >= least):
                batches.append([])
            batches[-1].append(cell)
        return batches

    def _block(self, cell: Cell) -> int:
        """Return the last block that lies below a cell, in full; negative if none does."""
        site = self._infos[cell.site].site
        layer = -1 if site.layer is None else site.layer
        return layer if site.kind == "resid_post" else layer - 1

    def _start_of(self, cells: Sequence[Cell]) -> "_Start | None":
        """Return where a pass can start: at the highest residual stream between blocks that is below its cells."""
        block = min(self._block(cell) for cell in cells)
        if self._anatomy is None or block not in self._streams:
            return None
        skip = skip_below(self._anatomy, block + 1)
        return None if skip.problem else _Start(self._streams[block], skip)

    def _patched_logits(
        self,
        pair: Pair,
        cells: Sequence[Cell],
        values: Mapping[str, Tensor],
        start: "_Start | None",
        streams: Mapping[str, Tensor],
    ) -> Tensor:
        """Run a copy of the corrupted example for each cell, with the clean value put in there.

        Args:
            pair: The pair.
            cells: The cells.
            values: Values of the clean run.
            start: Where the pass starts; None: at the embedding.
            streams: Values of the corrupted run where passes start.
        """

        def put_in(name: str, tensor: Tensor) -> Tensor:
            if start is not None and name == start.info.name:
                tensor.copy_(streams[name])
            for copy, cell in enumerate(cells):
                if cell.site == name:
                    tensor[copy][cell.at] = values[name][0][cell.at]
            return tensor

        tapped = {cell.site: self._infos[cell.site] for cell in cells}
        if start is not None:
            tapped[start.info.name] = start.info
        with tap(self._model, tapped, put_in), skipping(Skip(()) if start is None else start.skip):
            return self._logits(pair.corrupted, len(cells))

    def _logits(self, ids: Sequence[int], n_copies: int) -> Tensor:
        """Run copies of an example; return the logits after the last position, (C, V)."""
        core = core_of(self._model)
        ids_CT = torch.tensor([list(ids)] * n_copies, device=input_device(core))
        output = self._model(**forward_kwargs(core, ids_CT, torch.ones_like(ids_CT), needs_logits=self._needs_logits))
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise CaptureError(f"{type(core).__name__} gives no logits: patching needs a language modelling head")
        return logits.full_tensor()[:, -1] if isinstance(logits, DTensor) else logits[:, -1]


class _Start(NamedTuple):
    """A residual stream after a block, and the blocks up to there."""

    info: SiteInfo
    skip: Skip


def _streams(model: nn.Module) -> dict[int, SiteInfo]:
    """Return the residual stream after each block, by its number."""
    try:
        infos = unsharded_sites(core_of(model), ["resid_post.*"])
    except UnknownSiteError:
        return {}
    return {info.site.layer: info for info in infos.values() if info.site.layer is not None}


def _effects(step: Tensor, gradient: Tensor, cells: Sequence[Cell]) -> dict[Cell, float]:
    """Return the product of gradient and step, both (T, *row), summed over each cell."""
    product = step.double() * gradient.double()
    return {cell: float(product[cell.at].sum()) for cell in cells}


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[list[Tensor]]:
    """Let gradients reach every site even if no parameter requires them; yield the outputs of the embedding.

    The list stays empty in a later stage of a pipeline.
    """
    embedded: list[Tensor] = []

    def start_graph(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        embedded.append(output.requires_grad_())

    core = core_of(model)
    if not isinstance(core, PreTrainedModel):
        raise PlanError(f"{type(core).__name__} is no transformers model, whose embedding gradients could start at")
    embedding = core.get_input_embeddings()
    with ExitStack() as stack:
        if not is_placeholder(embedding):
            stack.callback(embedding.register_forward_hook(start_graph).remove)
        yield embedded
