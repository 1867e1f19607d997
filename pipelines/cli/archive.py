"""The sub-commands that look at an archive or a model: info, verify, reproduce, sites."""

import argparse
from pathlib import Path
from typing import Any

from residua.pipelines.cli.job import add_archive, add_job, add_sample_flags, run_sample
from residua.pipelines.cli.progress import StepProgress
from residua.pipelines.cli.report import print_info, print_reproduction, print_sites, print_verification


def add(jobs: Any) -> None:
    """Add the sub-commands."""
    add_archive(add_job(jobs, "info", _info, "show what an archive holds"))
    add_archive(add_job(jobs, "verify", _verify, "re-hash every chunk of an archive; exit 1 if anything is damaged"))
    reproduce = add_job(
        jobs, "reproduce", _reproduce, "capture a sample of an archive again and compare; exit 1 if it differs"
    )
    add_sample_flags(reproduce, batches=4)
    sites = add_job(jobs, "sites", _sites, "list the sites that a model has, with shapes")
    sites.add_argument("--model", required=True, help="hub id or folder of the model")


def _info(options: argparse.Namespace) -> int:
    from residua.store.read.archive import Archive
    from residua.store.read.summary import summarise

    print_info(summarise(Archive(options.archive)), as_json=options.json)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from residua.store.read.verify import verify

    with StepProgress("shard", shown=not options.json) as progress:
        report = verify(Path(options.archive), on_shard=progress.step)
    print_verification(report, as_json=options.json)
    return 0 if report.is_sound else 1


def _reproduce(options: argparse.Namespace) -> int:
    from residua.pipelines.capture.reproduce import reproduce

    found = run_sample(options, reproduce, shown=True)
    print_reproduction(found, as_json=options.json)
    return 0 if found.is_exact else 1


def _sites(options: argparse.Namespace) -> int:
    from residua.capture.sites.names_to_modules import model_sites
    from residua.pipelines.setup.models import load_empty_model

    print_sites(options.model, model_sites(load_empty_model(options.model)), as_json=options.json)
    return 0
