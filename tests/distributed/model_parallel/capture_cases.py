"""Captures of models that are distributed in many ways, for a test that compares them with one process.

    torchrun --nproc-per-node N -m tests.distributed.model_parallel.capture_cases FOLDER

Writes one archive for each case into FOLDER, and a JSON file of what every worker did, or why it failed.
"""

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from residua.pipelines.capture.capture import capture_dataset
from residua.pipelines.capture.result import CaptureResult
from residua.pipelines.setup.models import stages_in_parallel
from residua.store.base.errors import PlanError
from tests.distributed.layouts.deepspeed_and_fairscale import fairscale_parallel
from tests.distributed.layouts.tensor_parallel_llama import parallel_llama
from tests.distributed.layouts.torch_pipeline import Pipeline
from tests.distributed.model_parallel.recorder_loop import LENGTHS as CALLS
from tests.distributed.model_parallel.recorder_loop import other_calls_are_refused, parts_are_refused, record
from tests.models.tiny import SPLIT, VOCABULARY

UNGATHERED = ("llama-columns",)
LENGTHS = (5, 3, 21, 40, 2, 9, 33, 1, 12, 30)
EVERYTHING = (
    "embed,resid_pre.1,resid_mid.1,resid_post.*,attn_out.1,mlp_out.2,q.*,k.1,v.1,z.1,pattern.1,final,logits,"
    "logits_top3,module:model.layers.1.mlp@output,module:model.layers.2.self_attn.o_proj@input"
)
EXPERTS = ",module:model.layers.1.mlp.gate@output"
BALANCED = "resid_post.*,mlp_act.*,q.*"


class Made(NamedTuple):
    """What is captured: a model or a torch pipeline, its sites, and its ranks if they have to be given."""

    model: Any
    sites: str
    group: dist.ProcessGroup | None = None


Make = Callable[[], Made]


def tokens() -> list[list[int]]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def sites_of(name: str) -> str:
    return EVERYTHING + (EXPERTS if name == "mixtral" else ",mlp_act.*")


def capture(model: Any, out: Path, sites: str, **more: Any) -> CaptureResult:
    return capture_dataset(model, tokens(), out=out, sites=sites, rows_per_shard=16, batch_tokens=64, **more)


def loaded(name: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> PreTrainedModel:
    """Load what rank 0 saved, in the way users of transformers' own parallelism do."""
    path = Path(sys.argv[1]) / name
    if dist.get_rank() == 0 and not path.exists():
        SPLIT[name]().save_pretrained(path)
    dist.barrier()
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(**sizes), dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    nn.Module.train(model, False)
    return model


def case(name: str, sites: str | None = None, **sizes: Any) -> Make:
    return lambda: Made(loaded(name, **sizes), sites_of(name) if sites is None else sites)


def stages_in_parallel_of(name: str) -> Make:
    def make() -> Made:
        with pytest.raises(KeyError):  # or transformers can do it by itself by now: then `stages_in_parallel` can go
            loaded(name, tp_size=2, pp_size=2)
        with stages_in_parallel():
            return Made(loaded(name, tp_size=2, pp_size=2), sites_of(name))

    return make


def scheduled(name: str, kind: type[ScheduleGPipe | Schedule1F1B], n_microbatches: int, *dims: str, **how: Any) -> Make:
    """A pipeline of two stages, alone or in a mesh of two by two."""

    def make() -> Made:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=dims) if dims else None
        return Made(Pipeline(name, n_microbatches, mesh, kind, **how).schedule, sites_of(name))

    return make


def by_hand(*shape: int, sequence: bool = False) -> Make:
    def make() -> Made:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[-len(shape) :])
        return Made(parallel_llama(mesh["tp"], sequence=sequence), sites_of("llama"))

    return make


def by_fairscale() -> Made:
    model, group = fairscale_parallel()
    return Made(model, sites_of("llama"), group)


CASES: dict[int, dict[str, Make]] = {
    2: {
        "llama-tp2": case("llama", tp_size=2),
        "llama-float64": case("llama", dtype=torch.float64, tp_size=2),
        "mixtral-ep2": case("mixtral", tp_size=2, ep_size=2),
        "llama-sequence": by_hand(2, sequence=True),
        "llama-columns": case("llama", tp_size=2),
        "llama-fairscale": by_fairscale,
        "llama-pp2": case("llama", pp_size=2),
        "mixtral-pp2": case("mixtral", pp_size=2),
        "llama-gpipe2-pp2": scheduled("llama", ScheduleGPipe, 2),
        "llama-gpipe4-pp2": scheduled("llama", ScheduleGPipe, 4),
        "qwen3-1f1b4-pp2": scheduled("qwen3", Schedule1F1B, 4, identities=True),
        "mixtral-1f1b2-pp2": scheduled("mixtral", Schedule1F1B, 2),
    },
    4: {
        "llama-tp4": case("llama", tp_size=4),
        "llama-balanced": case("llama", BALANCED, tp_size=4),
        "llama-columns": case("llama", "q.*,v.2,resid_post.0", tp_size=4),
        "qwen3-tp4": case("qwen3", tp_size=4),
        "mixtral-tp4": case("mixtral", tp_size=4),
        "llama-tp2-dp2": by_hand(2, 2),
        "llama-tp2-fsdp2": case("llama", tp_size=2, fsdp_size=2),
        "llama-1f1b-tp2": scheduled("llama", Schedule1F1B, 2, "pp", "tp"),
        "llama-gpipe2-dp2-pp2": scheduled("llama", ScheduleGPipe, 2, "dp", "pp"),
        "llama-gpipe4-fsdp2-pp2": scheduled("llama", ScheduleGPipe, 4, "fsdp", "pp"),
        "llama-pp2-tp2": stages_in_parallel_of("llama"),
    },
}
"""From the number of ranks to the cases that are tried on them; the part before the first dash is the model's name."""


def is_recorded(name: str) -> bool:
    """Whether a case is tried with `Recorder` too: each layout once, and torch's schedules are no models."""
    return not name.endswith(("-columns", "-balanced")) and "gpipe" not in name and "1f1b" not in name


def uneven_columns(model: PreTrainedModel, out: Path) -> None:
    with pytest.raises(PlanError, match=r"the ranks have 25, 25, 25, 23 columns of mlp_act\.0"):
        capture(model, out, "mlp_act.0", gather=False)


def recorded(name: str, made: Made, folder: Path) -> None:
    """Record a loop: each replica makes an archive of its own, and of independent ones the second is shorter."""
    model, sites, group = made
    replica = dist.get_rank() // 2 if name.endswith(("-dp2", "-fsdp2")) else 0
    n_calls = len(CALLS) - replica if name.endswith("-dp2") else len(CALLS)
    record(model, folder / f"{name}.recorded.{replica}.zarr", sites, n_calls=n_calls, group=group)
    if group is not None:
        parts_are_refused(model, folder / "parts.zarr")
    if name == "llama-tp2":
        other_calls_are_refused(model, folder / "other calls.zarr")


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name, make in CASES[dist.get_world_size()].items():
        if len(sys.argv) > 2 and name not in sys.argv[2:]:
            continue
        said: dict[str, Any] = {}
        try:
            model, sites, group = made = make()
            if is_recorded(name):
                recorded(name, made, folder)
            if name in UNGATHERED and dist.get_world_size() == 4:
                uneven_columns(model, folder / "uneven.zarr")
            out, gather = folder / f"{name}.zarr", name not in UNGATHERED
            result = capture(model, out, sites, gather=gather, tensor_parallel=group)
            said["workers"] = [asdict(worker) for worker in result.workers]
        except Exception:  # noqa: BLE001  # the boundary to one case: the others are tried all the same
            said["failure"] = f"rank {dist.get_rank()}: {traceback.format_exc()}"
        everyone: list[dict[str, Any]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, said)
        if dist.get_rank() == 0:
            failed = [found for found in everyone if "failure" in found]
            (folder / f"{name}.json").write_text(json.dumps(failed[0] if failed else said))
    gc.collect()  # models that hold on to the group go first
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
