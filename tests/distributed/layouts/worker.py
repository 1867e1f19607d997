"""One rank of a launch: build each layout, compare it with one process, and write rows as JSON.

`launches.py` runs it: ``worker.py FOLDER LAUNCH [LAYOUT ...]``. Rank 0 writes ``FOLDER/LAUNCH.json``.
"""

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tests.distributed.checks import jobs, prehooks, restoration, runs, stages
from tests.distributed.checks.refusals import CHECKS, Load
from tests.distributed.layouts import (
    data_parallel_rows,  # noqa: F401  # it enters its rows in the registry
    pipeline_parallel_rows,  # noqa: F401  # likewise
    tensor_parallel_rows,  # noqa: F401  # likewise
)
from tests.distributed.layouts.case import Row
from tests.distributed.layouts.launches import LAUNCHES
from tests.distributed.layouts.registry import FOLDER, ROWS, loaded


def refused(check: Callable[[Load], None]) -> Callable[[], Iterator[Row]]:
    def load(name: str = "llama", **config: int) -> PreTrainedModel:
        return loaded(name, torch.float32, **(config or {"tp_size": 2}))

    def rows() -> Iterator[Row]:
        check(load)
        yield from ()

    return rows


ASIDE = (*CHECKS, *prehooks.CHECKS, *jobs.CHECKS, *stages.CHECKS, *restoration.CHECKS, *runs.CHECKS)
ROWS |= {check.__name__: refused(check) for check in ASIDE}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found: dict[str, dict[str, Any]] = {}
    for name in LAUNCHES[sys.argv[2]][1]:
        if len(sys.argv) > 3 and name not in sys.argv[3:]:
            continue
        try:
            found[name] = {"rows": [row.as_dict() for row in ROWS[name]()]}
        except Exception:  # noqa: BLE001  # the boundary to one layout: the others are tried all the same
            found[name] = {"failure": f"rank {dist.get_rank()}: {traceback.format_exc()}"}
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]  # an engine that lingers would ask for ZeRO-3
        everyone: list[dict[str, Any]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, found[name])
        found[name] = next((result for result in everyone if "failure" in result), found[name])
    if dist.get_rank() == 0:
        (FOLDER / f"{sys.argv[2]}.json").write_text(json.dumps(found, indent=1))
    gc.collect()  # models that hold on to the group go first
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
