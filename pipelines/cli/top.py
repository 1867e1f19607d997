"""The sub-command `residua top`: the rows that lie furthest along a direction, with their text."""

import argparse
from typing import Any

from residua.pipelines.cli.job import add_archive, add_cluster_flags, add_job, cluster_of
from residua.pipelines.cli.report import print_json, table


def add(jobs: Any) -> None:
    """Add the sub-command."""
    parser = add_job(jobs, "top", _top, "the rows that lie furthest along a direction or channel, with their text")
    add_archive(parser)
    parser.add_argument("--site", required=True, metavar="STR", help="the site, for example resid_post.3")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--direction", metavar="FILE", help=".npy or .safetensors; of a saved probe, probe.safetensors")
    which.add_argument("--channel", type=int, metavar="INT", help="the number of one channel")
    parser.add_argument("--head", type=int, metavar="INT", help="of a site with heads, the one that is meant")
    parser.add_argument("-k", type=int, default=20, metavar="INT", help="how many rows (20)")
    parser.add_argument("--bottom", action="store_true", help="the rows that lie furthest the other way")
    parser.add_argument("--per-example", action="store_true", help="at most one row of an example")
    parser.add_argument("--where", metavar="STR", help="only these rows, for example 'position > 0'")
    parser.add_argument("--out", dest="file", metavar="FILE", help="write the table there too, as Parquet")
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
    """Return the text without line ends and control characters, which would spoil the terminal."""
    return f"token {line['token']}" if line["text"] is None else repr(line["text"])[1:-1]
