"""The sub-command `residua fidelity`: what the rounding of stored rows does to the model."""

import argparse
from dataclasses import asdict
from typing import Any

from residua.pipelines.cli.job import add_job, add_sample_flags, add_split_flags, run_sample, speaks_for_all
from residua.pipelines.cli.report import print_json, table


def add(jobs: Any) -> None:
    """Add the sub-command."""
    parser = add_job(jobs, "fidelity", _fidelity, "measure what the rounding of stored rows does to the model's output")
    add_sample_flags(parser, batches=16)
    add_split_flags(parser)


def _fidelity(options: argparse.Namespace) -> int:
    from residua.pipelines.replay.fidelity import fidelity

    is_first = speaks_for_all()
    found = run_sample(options, fidelity, shown=is_first, tp=options.tp, pp=options.pp)
    if not is_first:
        return 0
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
