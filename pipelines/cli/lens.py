"""The commands `lens train` and `lens show`."""

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from residua.pipelines.cli.options import (
    MANY_PASSES,
    add_archive,
    add_cluster_flags,
    add_command,
    add_settings,
    cluster_of,
    given,
)
from residua.pipelines.cli.report import print_json
from residua.store.base.errors import AnalysisError
from residua.store.storage.address import joined

if TYPE_CHECKING:
    from residua.analysis.lens.lens import TunedLens


def add(commands: Any) -> None:
    """Add the commands."""
    from residua.analysis.lens.lens_settings import LensSettings

    text = "train and show tuned lenses: what each layer would predict"
    parser = commands.add_parser("lens", help=text, description=f"{text[0].upper()}{text[1:]} (Belrose et al., 2023).")
    lenses = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    text = "train a tuned lens on an archive, without the model"
    description = (
        "Train a tuned lens at each stored site of the residual stream: an affine map after which the model's own "
        "unembedding predicts the next token as the full model does. Needs the archive alone, not the model."
    )
    train = add_command(lenses, "train", _train, text, description)
    add_archive(train)
    train.add_argument("--out", required=True, help="folder of the lens, which is resumed, or address in a bucket")
    train.add_argument("--sites", help="sites to train at, comma separated, with patterns (default: all)")
    add_settings(train, fields(LensSettings))
    train.set_defaults(when_stopped="stopped: finished layers are safe. Run the same command again to go on.")
    add_cluster_flags(train)
    text = "show how good a lens is on held-out examples"
    show = add_command(lenses, "show", _show, text, f"{text[0].upper()}{text[1:]}, next to the logit lens.")
    show.add_argument("lens", help="folder of the lens, or its address")


def _train(options: argparse.Namespace) -> int:
    from residua.analysis.lens.lens import TunedLens
    from residua.analysis.lens.lens_settings import LensSettings
    from residua.store.read.stacks import main_archive, open_archive

    settings = LensSettings(**given(options, (setting.name for setting in fields(LensSettings))))
    sites = None if options.sites is None else [site.strip() for site in options.sites.split(",")]
    archive = main_archive(open_archive(options.archive))  # of several stacks that of the logits
    with cluster_of(options, archive, options.sites, passes=MANY_PASSES) as cluster:
        lens = TunedLens.fit(archive, sites=sites, out=options.out, cluster=cluster, settings=settings)
    _print(lens, options.out, as_json=options.json)
    return 0


def _show(options: argparse.Namespace) -> int:
    from residua.analysis.lens.lens import TunedLens

    lens = TunedLens.load(options.lens)
    if lens.report is None:
        raise AnalysisError(
            f"{options.lens} holds a lens without a report, as the tuned-lens package writes it: train one "
            "with residua lens train to have it evaluated"
        )
    _print(lens, options.lens, as_json=options.json)
    return 0


def _print(lens: "TunedLens", folder: str, *, as_json: bool) -> None:
    from residua.analysis.lens.evaluate import LOGIT_LENS
    from residua.analysis.lens.lens import PLOT_FILE, REPORT_FILE

    report = [] if lens.report is None else lens.report.to_pylist()
    paths = {"lens": folder, "report": joined(folder, REPORT_FILE), "plot": joined(folder, PLOT_FILE)}
    if as_json:
        print_json({**paths, "sites": report})
        return
    width = max(len(line["site"]) for line in report)
    print(f"{'':{width}}  KL divergence, nats       same top 1               cross-entropy, nats")
    print(f"{'site':{width}}  logit lens  tuned lens   logit lens  tuned lens   logit lens  tuned lens  kept")
    for line in report:
        pairs = [
            f"{_number(line[f'{name}_logit_lens']):>10}  {_number(line[name]):>10}"
            for name in ("kl", "agreement", "cross_entropy")
        ]
        print(f"{line['site']:{width}}  {'   '.join(pairs)}  {line['kept']}")
    n_rows, of_model = report[0]["rows"], _number(report[0]["cross_entropy_model"])
    print(f"{n_rows:,} held-out rows; the model's own cross-entropy is {of_model} nats")
    if n_without := sum(line["kept"] == LOGIT_LENS for line in report):
        print(
            f"note: {n_without} of {len(report)} sites keep the logit lens, because no map was better on held-out "
            "rows: train on more rows (--rows), or capture more"
        )
    for name, path in paths.items():
        print(f"{name:7} {path}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
