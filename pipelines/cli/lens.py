"""The sub-commands of tuned lenses: train one on an archive, show what it scored."""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from residua.pipelines.cli.job import add_archive, add_cluster_flags, add_job, add_settings, cluster_of
from residua.store.base.errors import AnalysisError

if TYPE_CHECKING:
    from residua.analysis.lens.lens import TunedLens


def add(jobs: Any) -> None:
    """Add the sub-commands."""
    from residua.analysis.lens.settings import LensSettings

    parser = jobs.add_parser("lens", help="tuned lenses: what each depth would predict", description=__doc__)
    lenses = parser.add_subparsers(title="jobs", required=True, metavar="JOB")
    train = add_job(lenses, "train", _train, "train a tuned lens on an archive, without the model")
    add_archive(train)
    train.add_argument("--out", required=True, help="folder of the lens; an unfinished one goes on")
    train.add_argument("--sites", help="sites to train at, comma separated, with patterns (default: all)")
    add_settings(train, fields(LensSettings))
    train.set_defaults(when_stopped="stopped: finished layers are safe. Run the same command again to go on.")
    add_cluster_flags(train)
    show = add_job(lenses, "show", _show, "show what a lens scored on held-out examples")
    show.add_argument("lens", help="folder of the lens")


def _train(options: argparse.Namespace) -> int:
    from residua.analysis.lens.lens import TunedLens
    from residua.analysis.lens.settings import LensSettings

    given = {f.name: value for f in fields(LensSettings) if (value := getattr(options, f.name)) is not None}
    settings = LensSettings(**given)
    sites = None if options.sites is None else [site.strip() for site in options.sites.split(",")]
    with cluster_of(options) as cluster:
        lens = TunedLens.fit(options.archive, sites=sites, out=options.out, cluster=cluster, settings=settings)
    _print(lens, Path(options.out), as_json=options.json)
    return 0


def _show(options: argparse.Namespace) -> int:
    from residua.analysis.lens.lens import TunedLens

    lens = TunedLens.load(options.lens)
    if lens.report is None:
        raise AnalysisError(
            f"{options.lens} holds a lens without a report, which lenses of the tuned-lens package have not: train "
            "one with residua lens train to have it evaluated"
        )
    _print(lens, Path(options.lens), as_json=options.json)
    return 0


def _print(lens: "TunedLens", folder: Path, *, as_json: bool) -> None:
    from residua.analysis.lens.lens import PLOT_FILE, REPORT_FILE

    report = [] if lens.report is None else lens.report.to_pylist()
    places = {"lens": str(folder), "report": str(folder / REPORT_FILE), "plot": str(folder / PLOT_FILE)}
    if as_json:
        print(json.dumps({**places, "sites": report}))
        return
    width = max(len(line["site"]) for line in report)
    print(f"{'':{width}}  KL divergence, nats       same first guess         cross-entropy, nats")
    print(f"{'site':{width}}  logit lens  tuned lens   logit lens  tuned lens   logit lens  tuned lens  kept")
    for line in report:
        pairs = [
            f"{_number(line[f'{name}_logit_lens']):>10}  {_number(line[name]):>10}"
            for name in ("kl", "agreement", "cross_entropy")
        ]
        print(f"{line['site']:{width}}  {'   '.join(pairs)}  {line['kept']}")
    print(f"{report[0]['rows']:,} held-out rows; the model's own cross-entropy is {_number(_own(report))} nats")
    for name, place in places.items():
        print(f"{name:7} {place}")


def _own(report: list[dict[str, Any]]) -> float | None:
    own: float | None = report[0]["cross_entropy_model"]
    return own


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
