"""Compare a distributed model with one process; the largest difference is a row of the table of layouts."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from residua.capture.taps.reading import TapFunction
from residua.capture.taps.tap import Tap, tap
from tests.distributed.layouts.single_process import EDITED, EDITS, Expected, loss_of, site_names, trained


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: a layout, a model, and how far it was from one process.

    ``error`` is the largest ``max|a-b| / max|b|`` over sites and ranks; 0 means bit for bit. ``reason`` is the error of
    a layout that does not run here at all, without us.
    """

    layout: str
    model: str
    what: str
    n_sites: int
    error: float
    bound: float
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A spread model under test.

    ``owns`` tells whether this rank is the one of its replica on which functions run; ``staged`` that sites lie on
    different ranks, as in a pipeline; ``group`` has the ranks of a replica, if `tap` has to be given them; ``seed`` is
    that of the batch.
    """

    layout: str
    name: str
    model: nn.Module
    inputs: Mapping[str, Any]
    expected: Expected
    owns: bool
    bound: float = 0.0
    staged: bool = False
    group: dist.ProcessGroup | None = None
    seed: int = 0

    def forward(self) -> Row:
        """Every site's value, on the owner and nowhere else."""
        kept: dict[str, Tensor] = {}
        with self._tapped(kept.__setitem__), torch.no_grad():
            logits = whole(self.model(**self.inputs).logits)
        assert torch.allclose(logits, self.expected.logits, atol=1e-3), "the spread model itself is wrong"
        return self._row("forward", kept, self.expected.values)

    def gradients(self) -> Row:
        """Every site's gradient, on the owner and nowhere else."""
        kept: dict[str, Tensor] = {}
        with self._tapped(kept.__setitem__, backward=True):
            loss_of(self.model, self.inputs).backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
        self.model.zero_grad()
        return self._row("gradients", kept, self.expected.gradients)

    def edits(self) -> Row:
        """Logits with one site changed, on every rank."""
        got, wanted = {}, {}
        for (site, kind), logits in self.expected.edited.items():
            with tap(self.model, site, EDITS[kind], tensor_parallel=self.group), torch.no_grad():
                got[f"{site} {kind}"] = whole(self.model(**self.inputs).logits)
            wanted[f"{site} {kind}"] = logits
            assert not torch.equal(logits, self.expected.logits), f"{kind} at {site} changes nothing: no test"
        return self.noted("edits", got, wanted, n_sites=len([s for s in EDITED if s in self.expected.values]))

    def training(self) -> Row:
        """The gradient of a module that lives inside the model, for a whole and for a split site.

        Every rank has it; in a pipeline, every rank of the stage that has the site.
        """
        got: dict[str, Tensor] = {}
        for site, wanted in self.expected.trained.items():
            gradient = trained(self.model, site, len(wanted), self.inputs, self.group)
            assert gradient is not None or self.staged
            got |= {} if gradient is None else {site: gradient}
        return self._of_stages("training", got, self.expected.trained)

    def _of_stages(self, what: str, got: dict[str, Tensor], wanted: dict[str, Tensor]) -> Row:
        """Compare what some rank has to have."""
        names: list[set[str]] = [set()] * dist.get_world_size()
        dist.all_gather_object(names, set(got))
        assert set().union(*names) == wanted.keys(), "nobody had it"
        return self.noted(what, got, {site: wanted[site] for site in got}, n_sites=len(wanted))

    def _tapped(self, function: TapFunction, *, backward: bool = False) -> AbstractContextManager[Tap]:
        names = site_names(self.model, self.name)
        return tap(self.model, names, function, backward=backward, tensor_parallel=self.group)

    def _row(self, what: str, kept: dict[str, Tensor], wanted: dict[str, Tensor]) -> Row:
        if self.staged:
            assert self.owns or not kept, f"functions ran where they should not: {kept}"
        else:
            assert kept.keys() == (wanted.keys() if self.owns else set()), (
                f"functions ran where they should not: {kept}"
            )
        names: list[set[str]] = [set()] * dist.get_world_size()
        dist.all_gather_object(names, set(kept))
        assert sorted(site for found in names for site in found if self.staged) == sorted(wanted if self.staged else [])
        assert set().union(*names) == wanted.keys(), "some site was met nowhere"
        return self.noted(what, kept, {site: wanted[site] for site in kept}, n_sites=len(wanted))

    def noted(
        self, what: str, got: dict[str, Tensor], wanted: dict[str, Tensor], *, n_sites: int, bound: float | None = None
    ) -> Row:
        """Return the row of a comparison: the largest error of all ranks."""
        errors = {site: relative_error(got[site], wanted[site]) for site in wanted}
        everyone: list[dict[str, float]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, errors)
        error = max((value for rank in everyone for value in rank.values()), default=0.0)
        if error > self.bound:
            print(self.layout, self.name, what, {k: v for k, v in errors.items() if v > self.bound}, flush=True)
        return Row(layout=self.layout, model=self.name, what=what, n_sites=n_sites, error=error, bound=self.bound)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value; infinite where shape or type differ."""
    got, wanted = got.detach(), wanted.detach()
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return float("inf")
    if torch.equal(got, wanted):
        return 0.0
    return ((got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-30)).item()
