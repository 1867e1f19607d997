"""The command `top`: the rows furthest along a direction, with their text."""

import argparse
from typing import Any

from residua.pipelines.cli.options import WHERE_HELP, add_archive, add_cluster_flags, add_command, cluster_of
from residua.pipelines.cli.report import print_json, table


def add(commands: Any) -> None:
    """Add the command."""
    text = "find the rows furthest along a direction or channel"
    description = "Find the rows of a site that are furthest along a direction or channel, and show them in their text."
    parser = add_command(commands, "top", _top, text, description)
    add_archive(parser)
    parser.add_argument("--site", required=True, metavar="STR", help="the site, for example resid_post.3")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--direction",
        metavar="FILE",
        help="file with the direction: .npy or .safetensors, such as probe.safetensors of a saved probe",
    )
    which.add_argument("--channel", type=int, metavar="INT", help="number of one channel, from 0")
    parser.add_argument("--head", type=int, metavar="INT", help="number of one head, from 0, at a site with heads")
    parser.add_argument("-k", type=int, default=20, metavar="INT", help="number of rows to show (default: %(default)s)")
    parser.add_argument(
        "--bottom", action="store_true", help="show the rows furthest in the opposite direction (default: off)"
    )
    parser.add_argument("--per-example", action="store_true", help="show at most one row of an example (default: off)")
    parser.add_argument("--where", metavar="STR", help=WHERE_HELP)
    parser.add_argument("--out", dest="file", metavar="FILE", help="also write the table to this Parquet file")
    add_cluster_flags(parser)


def _top(options: argparse.Namespace) -> int:
    from pyarrow.parquet import write_table

    from residua.analysis.stats.directions import read_direction
    from residua.analysis.stats.top import top
    from residua.store.read.archive import Archive

    archive = Archive(options.archive)
    direction = None if options.direction is None else read_direction(options.direction)
    with cluster_of(options) as cluster:
        found = top(
            archive,
            options.site,
            direction=direction,
            channel=options.channel,
            head=options.head,
            k=options.k,
            bottom=options.bottom,
            per_example=options.per_example,
            where=options.where,
            cluster=cluster,
        )
    if options.file:
        write_table(found, options.file)
    if options.json:
        print_json({"site": options.site, "rows": found.to_pylist(), "file": options.file})
        return 0
    lines = [
        (f"{line['score']:.4g}", *(f"{line[name]:,}" for name in ("row", "example", "position")), _one_line(line))
        for line in found.to_pylist()
    ]
    print(table([("score", "row", "example", "position", "text"), *lines], (0, 1, 2, 3)))
    if options.file:
        print(f"table     {options.file}")
    return 0


def _one_line(line: dict[str, Any]) -> str:
    """Return the text without line ends and control characters, which could command the terminal."""
    return f"token {line['token']}" if line["text"] is None else repr(line["text"])[1:-1]
