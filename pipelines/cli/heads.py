"""The command `heads`: what every attention head of an archive looks at."""

import argparse
import math
from pathlib import Path
from typing import Any

from residua.pipelines.cli.options import (
    add_archive,
    add_cluster_flags,
    add_command,
    add_flag,
    cluster_of,
    default_folder,
)
from residua.pipelines.cli.report import print_json, table
from residua.store.selection.grammar import parse_numbers


def add(commands: Any) -> None:
    """Add the command."""
    text = "measure what every attention head looks at, and write the files that HeadVis's page opens"
    description = (
        "Compute the six measures of HeadVis for every attention head from stored queries and keys or patterns: "
        "self-attention, previous token, entropy, distance of query and key and its variance, induction. Writes a "
        "table, a picture and the JSON tree that HeadVis's page opens."
    )
    parser = add_command(commands, "heads", _heads, text, description)
    add_archive(parser)
    text = "where the attention weights come from: qk or pattern (default: patterns if they are stored)"
    add_flag(parser, "--from", text, dest="source", choices=("qk", "pattern"), metavar=None)
    add_flag(parser, "--layers", "layers to measure, for example 0,3-5 (default: all that can be)", metavar="NUMBERS")
    text = "examples of each head that HeadVis's page shows at each of ten levels of attention; 0 shows none"
    add_flag(parser, "--sequences", text, 2)
    add_flag(parser, "--out", "folder for the files (default: ARCHIVE-heads)", dest="folder", metavar="FOLDER")
    add_cluster_flags(parser)


def _heads(options: argparse.Namespace) -> int:
    from residua.analysis.attention.heads import MEASURES
    from residua.analysis.attention.headvis import heads
    from residua.store.read.stacks import open_archive
    from residua.store.storage.place import try_place

    layers = None if options.layers is None else parse_numbers(options.layers, "--layers")
    archive = open_archive(options.archive)
    folder = try_place(Path(options.folder or default_folder(archive.place, "heads", options.layers))).path
    with cluster_of(options) as cluster:
        found = heads(
            archive, out=folder, layers=layers, source=options.source, sequences=options.sequences, cluster=cluster
        )
    strongest = [
        max(found.to_pylist(), key=lambda line: -math.inf if line[name] is None else line[name]) for name in MEASURES
    ]
    if options.json:
        named = dict(zip(MEASURES, strongest, strict=True))
        print_json({"heads": found.num_rows, "highest": named, "archive": archive.place, "folder": str(folder)})
        return 0
    print(f"{found.num_rows} heads; the highest by each measure:")
    lines = [
        (name, f"{line['layer']}", f"{line['head']}", "-" if line[name] is None else f"{line[name]:.3f}")
        for name, line in zip(MEASURES, strongest, strict=True)
    ]
    print(table([("measure", "layer", "head", "value"), *lines], (1, 2, 3)))
    print(f"archive   {archive.place}")
    print(f"files     {folder}: measures.parquet, measures.csv, measures.png; for HeadVis: config.json and the others")
    return 0
