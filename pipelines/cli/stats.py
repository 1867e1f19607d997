"""The commands `stats` and `page`: the sites of an archive in tables and a picture, and a page to look at all of it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from residua.pipelines.cli.options import (
    WHERE_HELP,
    add_archive,
    add_cluster_flags,
    add_command,
    add_flag,
    add_results,
    cluster_of,
    default_folder,
)
from residua.pipelines.cli.report import print_json, table
from residua.pipelines.setup.capture_settings import SITES_HELP
from residua.store.base.errors import few

if TYPE_CHECKING:
    from residua.analysis.stats.site_stats import Stats


def add(commands: Any) -> None:
    """Add the commands."""
    text = "compute norms, moments, outlier channels and principal components of every site"
    description = f"{text[0].upper()}{text[1:]}, by channel and by position. Writes tables and a picture."
    parser = add_command(commands, "stats", _stats, text, description)
    add_archive(parser)
    add_flag(parser, "--sites", SITES_HELP, "*")
    add_flag(parser, "--where", WHERE_HELP)
    add_flag(parser, "--components", "principal components of each site; 0 computes none", 8)
    add_results(parser, "the files", "ARCHIVE-stats")
    add_cluster_flags(parser)
    _add_page(commands)


def _add_page(commands: Any) -> None:
    text = "make a static page of an archive, to look at in a browser"
    description = (
        "Write a folder with a page that shows an archive: sites with statistics, examples whose tokens are "
        "coloured by norm, by distance to the mean or along directions, the strongest rows, lens read-outs, and "
        "attention heads. It needs no server: open its index.html."
    )
    parser = add_command(commands, "page", _page, text, description)
    add_archive(parser)
    add_results(parser, "the page", "ARCHIVE-page")
    add_flag(parser, "--sites", SITES_HELP, "*")
    text = (
        "a direction, SITE=WHAT: channel:NUMBER, logit:TOKEN, folder or address of a saved probe, or a .npy, .npz or "
        ".safetensors file or its address, FILE#TENSOR[ROW] or FILE#TENSOR[:,COLUMN] for a feature of an autoencoder; "
        "SITE[HEAD]=WHAT for one head, NAME:=SITE=WHAT to name it; repeatable (default: none)"
    )
    parser.add_argument("--direction", dest="directions", action="append", default=[], metavar="DIRECTION", help=text)
    add_flag(
        parser, "--lens", "folder or address of a tuned lens for read-outs (default: the logit lens)", metavar="FOLDER"
    )
    add_flag(
        parser,
        "--heads",
        "scores of heads: folder or address of what residua heads or residua induction wrote (default: none)",
        metavar="PATH",
    )
    add_flag(parser, "--examples", "number of examples, spread evenly; those of the strongest rows are added", 1000)
    add_flag(parser, "--tokens", "tokens to show of an example, from its first one on", 256)
    add_flag(parser, "-k", "rows to show at either end of each measure", 20)
    add_flag(parser, "--lens-examples", "number of examples with read-outs of the lens", 100)
    add_cluster_flags(parser)


def _stats(options: argparse.Namespace) -> int:
    from residua.analysis.stats.stats import stats
    from residua.analysis.support.plots import plot_norms
    from residua.store.read.stacks import open_archive
    from residua.store.storage.place import result_folder

    archive = open_archive(options.archive)
    place = options.folder or default_folder(archive.place, "stats", options.where)
    with result_folder(place) as folder:
        with cluster_of(options, archive, options.sites) as cluster:
            found = stats(archive, options.sites, components=options.components, where=options.where, cluster=cluster)
        found.save(folder)
        plot_norms(folder / "norms.png", found.positions)
    if options.json:
        print_json({"sites": found.sites.to_pylist(), "folder": str(place)})
    else:
        _print(found, place)
    return 0


def _print(found: "Stats", folder: str | Path) -> None:
    heading = ("site", "width", "mean", "std", "kurtosis", "row kurtosis", "norm", "outlier channels", "1st component")
    lines = [
        (
            line["site"],
            f"{line['width']:,}",
            f"{line['mean']:.3g}",
            f"{line['variance'] ** 0.5:.3g}",
            f"{line['kurtosis']:.3g}",
            f"{line['row_kurtosis']:.3g}",
            f"{line['norm_mean']:.3g} ± {line['norm_std']:.2g}",
            few(line["outlier_channels"]),
            f"{line['component_shares'][0]:.0%}" if line["component_shares"] else "-",
        )
        for line in found.sites.to_pylist()
    ]
    of_stacks = dict.fromkeys(found.sites["n_rows"].to_pylist())
    print(f"{' and '.join(f'{n_rows:,}' for n_rows in of_stacks)} rows")
    print(table([heading, *lines], (1, 2, 3, 4, 5, 6, 8)))
    for line in found.sites.to_pylist():
        if line["n_nonfinite"]:
            print(
                f"warning: {line['site']} has {line['n_nonfinite']:,} NaN or infinite values in "
                f"{line['n_nonfinite_rows']:,} rows, which are left out"
            )
        if line["component_shares"] is None:
            print(f"note: {line['site']} has no principal components: its covariance was not wanted or is too large")
    print(f"files     {folder}: sites, channels, positions (.parquet), components.safetensors, norms.png")


def _page(options: argparse.Namespace) -> int:
    from residua.analysis.page.page import page
    from residua.store.read.stacks import open_archive

    archive = open_archive(options.archive)
    folder = options.folder or default_folder(archive.place, "page")
    with cluster_of(options, archive, options.sites) as cluster:
        found = page(
            archive,
            folder,
            sites=options.sites,
            directions=options.directions,
            lens=options.lens,
            heads=options.heads,
            examples=options.examples,
            tokens=options.tokens,
            k=options.k,
            lens_examples=options.lens_examples,
            cluster=cluster,
        )
    if options.json:
        print_json({**found._asdict(), "file": str(found.file)})
        return 0
    print(f"{found.n_examples:,} examples, {found.n_bytes / 2**20:,.1f} MiB")
    for note in found.notes:
        print(f"note: {note}")
    print(f"page      {found.file}: open it in a browser")
    return 0
