"""Replay on a distributed model against one process: logits, later sites, and who reads the stored rows."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

import residua
from residua.capture.buffers.row_index import Indices
from residua.capture.edits.action import StoredRows
from residua.capture.replay.replay import Replay
from residua.store.base.errors import CaptureError
from tests.distributed.checks.one_process import computed_once
from tests.distributed.layouts.case import Case, Row, relative_error
from tests.distributed.layouts.single_process import batch, vector
from tests.models.tiny import SPLIT

BOUND = 2e-5  # that of the table of layouts, in float32
KEPT = ("z.2", "mlp_out.2", "final")
STORED = ("resid_post.0", "mlp_out.2")  # whose rows go in
N_EXAMPLES = 4  # in a recorded batch


class Load(Protocol):
    """Loads a model over the ranks of this launch, as `tests.distributed.layouts.registry.loaded` does."""

    def __call__(self, name: str = "llama", **config: int) -> PreTrainedModel: ...


def edits_for(width: int) -> list[dict[str, Any]]:
    return [
        {"edit": "add", "site": "resid_post.1", "vector": vector(width), "scale": 2.0, "positions": "1:4"},
        {"edit": "zero", "site": "z.2", "heads": [1]},
        {"edit": "set", "site": "mlp_out.2", "to": "stored", "positions": [-1]},
        {"edit": "mean", "site": "final", "positions": [0]},
    ]


def bare(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model in one process, with parameters of a type: rotary frequencies stay as they are."""
    model = SPLIT[name]()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return multiplying(model, dtype)


def multiplying(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Let experts multiply as they can in this type: torch's grouped product knows no float64."""
    if dtype == torch.float64 and hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("batched_mm")
    return model


def archive_of(name: str, dtype: torch.dtype = torch.float32) -> Path:
    """Two batches of a model in one process, recorded by rank 0."""
    path = Path(sys.argv[1]) / f"replay-{name}-{str(dtype).removeprefix('torch.')}"
    if dist.get_rank() == 0 and not path.exists():
        model = bare(name, dtype)
        with residua.Recorder(model, sites="resid_post.*,mlp_out.2,final", out=path, codec="raw"), torch.no_grad():
            for seed in (0, 1):
                model(**batch(seed, n_examples=N_EXAMPLES))
    dist.barrier()
    return path


@dataclass(frozen=True)
class Found:
    """What one rank has of a replay: by site, and how often it read stored rows."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    reads: Counter[str]
    n_skipped: int


def replayed(model: Any, path: Path, *, first: int, grad: bool = False, **how: Any) -> Found:
    width = int(next(iter(SPLIT.values()))().config.hidden_size)
    examples = [first + 1, first, first + 2]
    with (
        counting_reads() as reads,
        residua.replay(
            model, path, examples=examples, at="resid_post.0", edits=edits_for(width), keep=KEPT, grad=grad, **how
        ) as run,
    ):
        values = {"logits": torch.cat(run.logits), **dict(rows_here(run))}
        gradients = run.gradients("loss") if grad else {}
        joined = {site: torch.cat(rows) for site, rows in gradients.items()}
        return Found(values, joined, reads, run.skipped_blocks)


def rows_here(run: Replay) -> Iterator[tuple[str, Tensor]]:
    for site in KEPT:
        try:
            yield site, torch.cat(run[site])
        except CaptureError as error:
            assert "another process" in str(error)  # noqa: PT017  # only where functions do not run


@contextmanager
def counting_reads() -> Iterator[Counter[str]]:
    reads: Counter[str] = Counter()
    read, prefetch = StoredRows.read, StoredRows.prefetch

    def counted(self: StoredRows, site: str, rows: Indices) -> Tensor:
        reads[site] += 1
        return read(self, site, rows)

    def counted_ahead(self: StoredRows, site: str, rows: Indices) -> None:
        reads[site] += 1
        prefetch(self, site, rows)

    with mock.patch.multiple(StoredRows, read=counted, prefetch=counted_ahead):
        yield reads


def replay_row(case: Case, pipeline: Any = None) -> Row:
    """Logits and later sites from stored rows, edited on the way, against one process; and who reads stored rows.

    Args:
        case: The spread model.
        pipeline: What runs it instead: a schedule of torch's pipelines.
    """
    dtype, first = case.expected.logits.dtype, N_EXAMPLES * case.seed
    path = archive_of(case.name, dtype)
    wanted = computed_once(
        f"replay {case.name} {case.seed} {dtype}", lambda: replayed(bare(case.name, dtype), path, first=first).values
    )
    # under mixed precision the weights are float32, and not those that ran
    is_mixed = any(parameter.dtype != dtype for parameter in case.model.parameters())
    how: dict[str, Any] = {"force": is_mixed, "tensor_parallel": case.group}
    found = replayed(case.model if pipeline is None else pipeline, path, first=first, **how)
    everyone: list[Found] = [found] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    sites = [site for one in everyone for site in one.values if site != "logits"]
    assert set(sites) == set(KEPT), f"some site was met nowhere: {sites}"
    assert "logits" in found.values
    assert case.owns or (found.values.keys() == {"logits"} and not found.reads), "a rank read rows that it does not use"
    if case.staged:
        readers = [site for one in everyone for site in one.reads]
        assert sorted(readers) == sorted(STORED), f"each site's rows are read by one rank: {readers}"
    elif case.owns:
        assert found.reads.keys() == set(STORED)
    return case.noted("replay", found.values, {site: wanted[site] for site in found.values}, n_sites=len(KEPT))


def agrees(layout: str, name: str, model: nn.Module, *, first: int = 0, grad: bool = False) -> list[Found]:
    """Compare with one process; return what every rank has."""
    path = archive_of(name)
    found = replayed(model, path, first=first, grad=grad)
    wanted = replayed(SPLIT[name](), path, first=first, grad=grad)
    assert set(wanted.values) == {"logits", *KEPT}
    for site, value in found.values.items():
        assert relative_error(value, wanted.values[site]) <= BOUND, (layout, name, site)
    gradients: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(gradients, set(found.gradients))
    assert set().union(*gradients) == wanted.gradients.keys()
    for site, value in found.gradients.items():
        assert relative_error(value, wanted.gradients[site]) <= BOUND, (layout, name, site, "gradient")
    everyone: list[Found] = [found] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    met = set().union(*(one.values for one in everyone))
    assert met == {"logits", *KEPT}, f"{layout}: some site was met nowhere"
    return everyone


def replays(load: Load) -> None:
    """Tensor parallel, pipeline and FSDP2, each over two ranks."""
    owner, other = agrees("TP 2", "llama", load("llama", tp_size=2))
    assert owner.reads
    assert owner.n_skipped == other.n_skipped == 1
    assert not other.reads, "a rank that runs no function read stored rows"
    assert other.values.keys() == {"logits"}
    agrees("TP 2", "qwen3", load("qwen3", tp_size=2), grad=True)
    first, last = agrees("PP 2", "llama", load("llama", pp_size=2), grad=True)
    assert first.n_skipped == 1
    assert first.reads.keys() == {"resid_post.0"}, "each stage reads what goes in at its own sites"
    assert last.reads.keys() == {"mlp_out.2"}
    for name in ("llama", "gpt2"):
        model = SPLIT[name]()
        for block in next(list(m) for m in model.modules() if isinstance(m, nn.ModuleList)):
            fully_shard(block)
        fully_shard(model)
        agrees("FSDP2", name, model, first=N_EXAMPLES * dist.get_rank(), grad=True)
