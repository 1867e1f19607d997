"""Run every benchmark and write `benchmarks/README.md`: `python benchmarks/run.py`, or `make bench`.

About twenty minutes on two cores, on a machine that does nothing else. One benchmark alone is `python
benchmarks/NAME.py`; `python benchmarks/run.py NAME` runs it and renews its part of the page.
"""

import ast
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
TITLES = {
    "capture": "What capturing costs",
    "write": "Writing",
    "read": "Reading",
    "analysis": "Reading for analysis",
    "memory": "Memory",
    "lens": "Tuned lenses",
    "throughput": "Two workers against one",
    "replay": "Replay from a layer on",
    "gpu": "On a GPU",
}
HEAD = """# Benchmarks

Made by `make bench`. Each part is one script and one command. Cases take turns, round by round, and ratios are taken
within a round, because a shared machine changes its speed; figures are medians with the least and the greatest.
CPU time stands beside the clock's. No test asserts any of them.
"""


def purpose(script: Path) -> str:
    """Return the head of a script: what it measures, and how."""
    return ast.get_docstring(ast.parse(script.read_text())) or ""


def measure(name: str) -> None:
    """Run one benchmark and keep what it reports."""
    results = FOLDER / "results"
    results.mkdir(exist_ok=True)
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--out", str(results / f"{name}.md")]
    subprocess.run(command, check=True)


def page() -> str:
    """Return the page that holds all reports."""
    parts = [HEAD]
    for name, title in TITLES.items():
        report = FOLDER / "results" / f"{name}.md"
        if report.is_file():
            parts.append(f"## {title}\n\n{purpose(FOLDER / f'{name}.py')}\n\n{report.read_text().strip()}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    for name in sys.argv[1:] or [name for name in TITLES if name != "gpu"]:  # which is run by name, where one is
        measure(name)
        (FOLDER / "README.md").write_text(page())
