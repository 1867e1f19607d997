"""Start a worker on several ranks, never wait for it longer than a limit, and read what it found."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
LIMIT_SECONDS = 480

LAYOUTS = {
    "one": (1, ("single", "device_map, cpu and disk offload")),
    "data": (
        2,
        ("DDP", "FSDP1", "FSDP2", "FSDP2, mixed precision", "Accelerate prepare", "DeepSpeed ZeRO-3", "fairscale FSDP"),
    ),
    "tensor": (
        2,
        (
            "transformers TP 2",
            "parallelize_module",
            "parallelize_module, sequence parallel",
            "expert parallel 2",
            "fairscale model parallel 2",
            "transformers PP 2",
            "torch PipelineStage, 2 stages",
        ),
    ),
    "four": (4, ("transformers TP 4", "TP 2 x DP 2", "TP 2 x FSDP 2", "transformers PP 2 x TP 2", "torch PP 2 x TP 2")),
}
"""From launch to the number of its ranks and the layouts that are tried in it."""

REFUSALS = (
    2,
    (
        "different_tokens",
        "partial_sums",
        "a_group_that_is_not_known",
        "functions_that_fail",
        "parts_without_gathering",
        "later_batches_and_switches",
        "a_site_that_never_fires",
        "replicas_with_unequal_batches",
        "rows_inside_experts",
        "generation",
        "parameters",
        "replays",
        "jobs_on_spread_models",
        "inputs_of_modules",
        "gradients_of_inputs",
        "gradients_through_a_pipeline",
        "leaving_leaves_nothing_behind",
        "names_in_stages",
    ),
)
"""Number of ranks, and the functions in `tests.distributed.checks` that run on them."""

LAUNCHES = {**LAYOUTS, "refusals": REFUSALS}


def launch(name: str, folder: Path) -> dict[str, Any]:
    """Run one launch under torchrun; from layout to its rows, or to why it failed.

    Raises:
        RuntimeError: The ranks did not come to an end in time, or left nothing behind; with what they printed.
    """
    n_ranks = LAUNCHES[name][0]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
    command += ["-m", "tests.distributed.layouts.worker", str(folder), name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        started = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            started.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGKILL)  # the session is its own: nothing else is in it
                started.wait()
    results = folder / f"{name}.json"
    if not results.exists():
        raise RuntimeError(f"the ranks of {name!r} ended with {started.returncode}:\n{log.read_text()[-4000:]}")
    found: dict[str, Any] = json.loads(results.read_text())
    return found
