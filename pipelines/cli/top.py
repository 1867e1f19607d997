"""The command `top`: the rows furthest along a direction, with their text."""

import argparse
from contextlib import ExitStack
from typing import Any

from residua.pipelines.cli.options import (
    WHERE_HELP,
    add_archive,
    add_cluster_flags,
    add_command,
    add_flag,
    add_switch,
    cluster_of,
)
from residua.pipelines.cli.report import print_json, printable, table


def add(commands: Any) -> None:
    """Add the command."""
    text = "find the rows furthest along a direction or channel"
    description = "Find the rows of a site that are furthest along a direction or channel, and show them in their text."
    parser = add_command(commands, "top", _top, text, description)
    add_archive(parser)
    add_flag(parser, "--site", "the site, for example resid_post.3", required=True)
    which = parser.add_mutually_exclusive_group(required=True)
    text = (
        "file with the direction, or its address: .npy or .safetensors, such as probe.safetensors of a saved probe; "
        "this or --channel is required"
    )
    add_flag(which, "--direction", text, metavar="FILE")
    add_flag(which, "--channel", "number of one channel, from 0; this or --direction is required", kind=int)
    add_flag(parser, "--head", "number of one head, from 0, at a site with heads (default: all heads)", kind=int)
    add_flag(parser, "-k", "number of rows to show", 20)
    add_switch(parser, "--bottom", "show the rows furthest in the opposite direction")
    add_switch(parser, "--per-example", "show at most one row of an example")
    add_flag(parser, "--where", WHERE_HELP)
    text = "columns of the examples, or of side tables, to show too, comma separated (default: none)"
    add_flag(parser, "--columns", text, metavar="NAMES")
    text = "also write the table to this Parquet file, or to this address in a bucket (default: none)"
    add_flag(parser, "--out", text, dest="file", metavar="FILE")
    add_cluster_flags(parser)


def _top(options: argparse.Namespace) -> int:
    from pyarrow.parquet import write_table

    from residua.analysis.stats.directions import read_direction
    from residua.analysis.stats.top import top
    from residua.store.read.stacks import open_archive
    from residua.store.storage.place import result_file

    archive = open_archive(options.archive)
    direction = None if options.direction is None else read_direction(options.direction)
    columns = options.columns.split(",") if options.columns else []
    with ExitStack() as stack:
        file = None if options.file is None else stack.enter_context(result_file(options.file))
        with cluster_of(options, archive, options.site) as cluster:
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
                columns=columns,
                cluster=cluster,
            )
        if file is not None:
            write_table(found, file)
    if options.json:
        print_json({"site": options.site, "rows": found.to_pylist(), "file": options.file})
        return 0
    lines = [
        (
            f"{line['score']:.4g}",
            *(f"{line[name]:,}" for name in ("row", "example", "position")),
            *(printable(line[name]) for name in columns),
            _one_line(line),
        )
        for line in found.to_pylist()
    ]
    print(table([("score", "row", "example", "position", *columns, "text"), *lines], (0, 1, 2, 3)))
    if options.file:
        print(f"table     {options.file}")
    return 0


def _one_line(line: dict[str, Any]) -> str:
    """Return the text without line ends and control characters, which could command the terminal."""
    return f"token {line['token']}" if line["text"] is None else repr(line["text"])[1:-1]
