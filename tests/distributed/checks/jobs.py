"""Jobs that run a distributed model again: their results against those of one process."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

import residua
from residua.capture.identity.padding import RAN_ALONE, padding_leaks
from residua.store.base.errors import PlanError
from residua.store.read.archive import Archive
from residua.store.sealing.losses import losses_of
from residua.store.verification.verify import verify
from tests.capture.leaking_models import LEAKING, module_values
from tests.capture.replay_samples import captured, tokens
from tests.distributed.checks.replay import counting_reads
from tests.distributed.layouts.deepspeed_and_fairscale import zero3
from tests.distributed.layouts.torch_pipeline import Pipeline
from tests.models.tiny import SPLIT

BOUND = 2e-5  # that of the table of layouts, in float32
EDITS = [
    {"edit": "scale", "site": "mlp_out.1", "by": 0.5, "positions": "2:"},
    {"edit": "swap", "site": "resid_post.0", "source": 0, "positions": [1]},
]
FOLLOWING = "mlp_out.1,resid_post.1,q.2,mlp_act.2,final,logits"
"""What is captured of the edited run: replicated and split sites, of both stages."""
PAIRS = [
    {"clean": [3, 9, 27, 81, *range(5, 5 + n)], "corrupted": [3, 9, 30, 81, *range(5, 5 + n)], "answer": 7, "wrong": 11}
    for n in range(3)
]
LATER = {"resid_post.1", "resid_pre.2", "resid_post.2", "final"}
READ_BY_THE_SECOND = {"tp": set[str](), "pp": LATER, "torch pp": LATER}
"""Sites whose rows the second process reads; every replica reads all that go in."""
Make = Callable[[], Any]


class Load(Protocol):
    """Loads a model over the ranks of this launch, as `tests.distributed.layouts.registry.loaded` does."""

    def __call__(self, name: str = "llama", **config: int) -> PreTrainedModel: ...


def results(model: Any, archive: Archive, lossy: Archive, out: Path, *, sweeps: bool = True) -> dict[str, pa.Table]:
    """The results of the jobs, as every rank gets them; without sweeps where these are refused."""
    replayed = residua.replay_dataset(
        model, archive, out=out / "replayed", at="resid_post.0", edits=EDITS, tokens=[7], capture=FOLLOWING
    )
    assert replayed.archive is not None
    assert verify(replayed.archive.path).problems == []
    following = {site: replayed.archive[site].torch(slice(0, archive.n_rows)) for site in replayed.archive.sites}
    sites = residua.fidelity(model, lossy.path).sites
    measured = {name: [site.kl_mean, site.kl_max, site.top1_agreement] for name, site in sites.items()}
    sweep: dict[str, Any] = {"sites": "resid_post.*,z.1", "positions": [2, -1]}
    found = {
        "tokens": replayed.tokens,
        "examples": replayed.examples,
        **{f"captured {site}": pa.table({"value": rows.flatten().numpy()}) for site, rows in following.items()},
        "fidelity": pa.table(measured),
    }
    if not sweeps:
        with pytest.raises(PlanError, match="not swept"):
            residua.patch(model, PAIRS, **sweep)
        return found
    return {
        **found,
        "patch": residua.patch(model, PAIRS, batch_cells=5, out=out / "patched", **sweep),
        "attribute": residua.attribute(model, PAIRS, **sweep),
    }


def sharded(model: nn.Module) -> nn.Module:
    for block in next(list(m) for m in model.modules() if isinstance(m, nn.ModuleList)):
        fully_shard(block)
    fully_shard(model)
    return model


def jobs_on_spread_models(load: Load) -> None:
    """Tensor parallel, pipeline, FSDP2 and ZeRO-3, each over two ranks."""
    folder, name = Path(sys.argv[1]) / "jobs", "llama"
    archive = captured(SPLIT[name](), folder / "acts.zarr", rows_per_shard=16)
    lossy = captured(SPLIT[name](), folder / "lossy.zarr", rows_per_shard=16, codec="int8-block32")
    wanted = results(SPLIT[name](), archive, lossy, folder / "whole")
    layouts: dict[str, tuple[Make, float]] = {
        "tp": (lambda: load(name, tp_size=2), BOUND),
        "pp": (lambda: load(name, pp_size=2), BOUND),
        "torch pp": (lambda: Pipeline(name, 2, None).schedule, BOUND),
        "fsdp": (lambda: sharded(SPLIT[name]()), 0.0),
        "zero3": (lambda: zero3(SPLIT[name]()), 2e-6),  # it adds gradients up in an order of its own
    }
    for layout, (make, bound) in layouts.items():
        model = make()
        with counting_reads() as reads:
            found = results(model, archive, lossy, folder / layout, sweeps=layout != "torch pp")
        if layout == "zero3":
            refuses_changed_inputs(model, archive, folder / "refused")
        sites: list[set[str]] = [set()] * dist.get_world_size()
        dist.all_gather_object(sites, set(reads))
        assert sites[1] == READ_BY_THE_SECOND.get(layout, sites[0]), (layout, sites)
        assert sites[0] | sites[1] == set(archive.sites) - {"z.1", "logits"}, (layout, sites)
        assert found.keys() == wanted.keys() or layout == "torch pp"
        for job, table in found.items():
            check(f"{layout}: {job}", table, wanted[job], bound)


def padding_that_leaks(_load: Load) -> None:
    """FSDP2 and ZeRO-3, over two ranks: examples run one by one on both, in step, with the rows of each alone."""
    folder, make = Path(sys.argv[1]) / "leaking", LEAKING["fnet"]
    sites: dict[str, Any] = {"sites": "resid_post.*,logits", "rows_per_shard": 8}
    archive = captured(make(), folder / "acts.zarr", **sites)
    asked: dict[str, Any] = {"edits": EDITS[1:], "at": "resid_post.0", "capture": "resid_post.2"}
    wanted = residua.replay_dataset(make(), archive, out=folder / "whole", **asked)
    spread: list[tuple[str, Any]] = [("fsdp", sharded(make())), ("zero3", zero3(make()))]
    for layout, model in spread:
        assert padding_leaks(model), layout
        found = captured(model, folder / f"{layout}.zarr", **sites)
        assert RAN_ALONE in str(found.provenance["notes"]), layout
        assert found.plan.batch_tokens == 1, layout
        replayed = residua.replay_dataset(model, archive, out=folder / layout, **asked)
        assert RAN_ALONE in replayed.notes, layout
        check(f"{layout}: replay", replayed.tokens, wanted.tokens, BOUND)
        assert replayed.archive is not None
        assert wanted.archive is not None
        pairs = [(replayed.archive, wanted.archive, "resid_post.2")]
        for one, other, site in [*pairs, *((found, archive, site) for site in archive.sites)]:
            rows = [each[site].torch(slice(0, archive.n_rows)) for each in (one, other)]
            torch.testing.assert_close(*rows, rtol=BOUND, atol=BOUND)
    for number, ids in enumerate(tokens()):
        alone = torch.from_numpy(archive.example(number)["resid_post.1"])
        torch.testing.assert_close(alone, module_values(make(), "fnet.encoder.layer.1", ids), rtol=BOUND, atol=BOUND)


def refuses_changed_inputs(model: Any, archive: Archive, out: Path) -> None:
    """ZeRO-3 shows what a module takes before it is edited: better no archive than that one."""
    edit = {"edit": "zero", "site": "mlp_act.1"}
    with pytest.raises(PlanError, match=r"mlp_act\.1.*under ZeRO-3.*cannot be read back; capture a later site"):
        residua.replay_dataset(model, archive, out=out, edits=[edit], capture="mlp_act.*")


def check(what: str, found: pa.Table, wanted: pa.Table, bound: float) -> None:
    assert found.schema == wanted.schema, what
    for column in wanted.column_names:
        one, other = found[column], wanted[column]
        if not pa.types.is_floating(other.type) or not bound:
            assert one == other, (what, column)
            continue
        values = np.nan_to_num(other.to_numpy().astype(float))
        error = np.abs(np.nan_to_num(one.to_numpy().astype(float)) - values).max()
        scale = max(1.0, np.abs(values).max())
        assert error <= bound * scale, (what, column, error, scale)


def casts_that_overflow(load: Load) -> None:
    """A finite value that the stored type makes infinite is counted once, whoever computed or stored it."""
    folder = Path(sys.argv[1]) / "overflow"
    exact = {site: torch.cat(rows) for site, rows in rows_by_plain_hooks().items()}
    spread: list[tuple[str, Any]] = [
        ("tp", load("llama", tp_size=2)),
        ("pp", load("llama", pp_size=2)),
        ("fsdp", sharded(SPLIT["llama"]())),
    ]
    for layout, model in spread:
        with_a_massive_block(model)
        archive = captured(model, folder / f"{layout}.zarr", sites=",".join(exact), dtype="float16", rows_per_shard=16)
        for site, rows in exact.items():
            wanted = int((rows.to(torch.float16).isinf() & rows.isfinite()).sum())
            found = losses_of(archive.plan.site(site), archive.commits)
            assert wanted, site
            assert found.n_overflowed == wanted, (layout, site, found, wanted)
        notes = archive.provenance["notes"]
        assert isinstance(notes, list)
        assert all(any(site in str(note) and "infinite" in str(note) for note in notes) for site in exact), layout


def rows_by_plain_hooks() -> dict[str, list[torch.Tensor]]:
    """What one process computes of each example alone: (tokens, width) for each site."""
    model, found = with_a_massive_block(SPLIT["llama"]()), dict[str, list[torch.Tensor]]()
    block = model.model.layers[1]

    def keep(site: str, value: Any) -> None:
        found.setdefault(site, []).append((value if isinstance(value, torch.Tensor) else value[0])[0])

    block.mlp.down_proj.register_forward_pre_hook(lambda _, args: keep("mlp_act.1", args[0]))
    block.mlp.register_forward_hook(lambda _, __, output: keep("mlp_out.1", output))
    block.register_forward_hook(lambda _, __, output: keep("resid_post.1", output))
    with torch.no_grad():
        for ids in tokens():
            model(torch.tensor([ids]))
    return found


def with_a_massive_block(model: Any) -> Any:
    """Let the values of the block's MLP pass the largest of float16, 65,504."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.1.mlp.up_proj" in name:
                parameter.mul_(1e7)
    return model


CHECKS = [jobs_on_spread_models, padding_that_leaks, casts_that_overflow]
