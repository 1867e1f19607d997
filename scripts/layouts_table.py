"""Try every layout with real processes, and write the table of `docs/distributed.md`.

The script writes the measured figures to ``docs/layouts.json``, and the table between the two marks in
``docs/distributed.md``. With ``--render`` it writes only the table, from the existing figures.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.distributed.layouts.launches import LAYOUTS, launch  # noqa: E402  # on the path since the line before
from tests.forking import ForkedWorkers  # noqa: E402  # likewise

FIGURES = ROOT / "docs" / "layouts.json"
PAGE = ROOT / "docs" / "distributed.md"
BEGIN, END = "<!-- table: scripts/layouts_table.py -->", "<!-- end of table -->"


def measured() -> list[dict[str, Any]]:
    """Launch every layout and return the rows; stop at the first failure."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, closing(ForkedWorkers(Path(folder))) as workers:
        for name in LAYOUTS:
            for layout, found in launch(workers, name, Path(folder)).items():
                if "failure" in found:
                    raise SystemExit(f"{layout}: {found['failure']}")
                rows += [{"launch": name, "tried": layout, **row} for row in found["rows"]]
                print(f"{layout}: {len(found['rows'])} rows", flush=True)
    return rows


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Return a Markdown table: for each layout and model, the largest error of each comparison."""
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
    """Write the table into the page, from the stored figures."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table(json.loads(FIGURES.read_text()))}\n{END}{after}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--render", action="store_true", help="only write the table, from the existing figures")
    if not parser.parse_args().render:
        FIGURES.write_text(json.dumps(measured(), indent=1) + "\n")
    render()
