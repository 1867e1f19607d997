"""Start a worker on several ranks, never wait for it longer than a limit, and read what it found."""

import json
from pathlib import Path
from typing import Any

from tests.forking import ForkedWorkers, launched

ROOT = Path(__file__).parents[3]
WORKER = "tests.distributed.layouts.worker"
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
        "prompts_on_spread_models",
        "casts_that_overflow",
        "padding_that_leaks",
        "inputs_of_modules",
        "gradients_of_inputs",
        "gradients_through_a_pipeline",
        "leaving_leaves_nothing_behind",
        "names_in_stages",
    ),
)
"""Number of ranks, and the functions in `tests.distributed.checks` that run on them."""

LAUNCHES = {**LAYOUTS, "refusals": REFUSALS}


def launch(workers: ForkedWorkers, name: str, folder: Path) -> dict[str, Any]:
    """Run one launch; from layout to its rows, or to why it failed.

    Raises:
        RuntimeError: The ranks left nothing behind; with what they printed.
    """
    ended = workers.run(launched([str(folder), name], LAUNCHES[name][0], module=WORKER), LIMIT_SECONDS)
    results = folder / f"{name}.json"
    if not results.exists():
        raise RuntimeError(f"the ranks of {name!r} left nothing behind: {ended}")
    found: dict[str, Any] = json.loads(results.read_text())
    return found
