"""The sub-command `residua fidelity`: what the rounding of stored rows does to the model."""

import argparse
from dataclasses import asdict
from typing import Any

from residua.pipelines.cli_job import add_archive, add_job
from residua.pipelines.progress import StepProgress
from residua.pipelines.report import print_json, table


def add(jobs: Any) -> None:
    """Add the sub-command."""
    parser = add_job(jobs, "fidelity", _fidelity, "measure what the rounding of stored rows does to the model's output")
    add_archive(parser)
    parser.add_argument("--model", required=True, help="hub id or folder of the model that was captured")
    parser.add_argument("--batches", type=int, default=16, metavar="INT", help="batches to run (default: 16)")
    parser.add_argument("--seed", type=int, default=0, metavar="INT", help="seed of the choice of batches")
    parser.add_argument("--device", default="auto", metavar="STR", help="device of the model: auto, cpu, cuda, ...")


def _fidelity(options: argparse.Namespace) -> int:
    from residua.pipelines.fidelity import fidelity

    with StepProgress("batch", shown=not options.json) as progress:
        found = fidelity(
            options.archive,
            options.model,
            n_batches=options.batches,
            seed=options.seed,
            device=options.device,
            on_batch=progress.step,
        )
    if options.json:
        print_json(asdict(found))
        return 0
    lines = [
        (name, f"{site.kl_mean:.2e}", f"{site.kl_max:.2e}", f"{100 * site.top1_agreement:.2f} %")
        for name, site in found.sites.items()
    ]
    print(f"{found.n_examples:,} examples, {found.n_tokens:,} tokens; KL in nats a token")
    print(table([("site", "mean KL", "largest KL", "same top 1"), *lines], (1, 2, 3)))
    return 0
