"""Try every layout with real processes and write the table that the documentation shows.

Writes ``docs/layouts.json``, what was measured, and with it the part of ``docs/distributed.md`` between the two
marks. With ``--render`` it only writes the page again from the figures that are there.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.distributed.layouts.launches import LAYOUTS, launch  # noqa: E402  # found on the line before

FIGURES = ROOT / "docs" / "layouts.json"
PAGE = ROOT / "docs" / "distributed.md"
BEGIN, END = "<!-- table: scripts/layouts_table.py -->", "<!-- end of table -->"


def measured() -> list[dict[str, Any]]:
    """Launch everything; return the rows, or stop with what failed."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in LAYOUTS:
            for layout, found in launch(name, Path(folder)).items():
                if "failure" in found:
                    raise SystemExit(f"{layout}: {found['failure']}")
                rows += [{"launch": name, "tried": layout, **row} for row in found["rows"]]
                print(f"{layout}: {len(found['rows'])} rows", flush=True)
    return rows


def table(rows: Iterable[dict[str, Any]]) -> str:
    """One line a layout and model: the largest difference of each thing that was compared."""
    kinds = ("forward", "gradients", "edits", "training", "replay", "capture")
    lines = ["| layout | model | sites | " + " | ".join(kinds) + " | bound |", "| --- " * (len(kinds) + 4) + "|"]
    for (layout, model), group in groupby(rows, key=lambda row: (row["layout"], row["model"])):
        found = {row["what"]: row for row in group}
        if "none" in found:
            lines.append(f"| {layout} | {model} | 0 | does not run: {found['none']['reason']} |{' |' * len(kinds)}")
            continue
        errors = [_shown(found[kind]["error"]) if kind in found else "" for kind in kinds]
        sites, bound = found["forward"]["n_sites"], _shown(found["forward"]["bound"])
        lines.append(f"| {layout} | {model} | {sites} | {' | '.join(errors)} | {bound} |")
    return "\n".join(lines)


def _shown(error: float) -> str:
    return "bitwise" if error == 0 else f"{error:.0e}"


def render() -> None:
    """Write the table into the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table(json.loads(FIGURES.read_text()))}\n{END}{after}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--render", action="store_true", help="write the page from the figures that are there")
    if not parser.parse_args().render:
        FIGURES.write_text(json.dumps(measured(), indent=1) + "\n")
    render()
