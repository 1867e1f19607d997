"""Run every benchmark and write `benchmarks/README.md`: `python benchmarks/run.py`, or `make bench`.

It takes about forty minutes on two cores, on a machine that does nothing else. `python benchmarks/NAME.py` runs one
benchmark; `python benchmarks/run.py NAME` runs it and updates its section of the page. Options go to the benchmark:
`python benchmarks/run.py versions --other FOLDER`. `python benchmarks/run.py page` writes the page of what was measured
before, and measures nothing.
"""

import ast
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
TITLES = {
    "capture": "What capturing costs",
    "write": "Writing",
    "read": "Reading",
    "analysis": "Reading for analysis",
    "trainers": "Training an autoencoder",
    "remote": "Archives at an address",
    "memory": "Memory",
    "lens": "Tuned lenses",
    "throughput": "Two workers against one",
    "replay": "Replay from a layer on",
    "gpu": "On a GPU",
    "sizes": "Real sizes",
    "opening": "Opening long archives",
    "beginning": "Before the first batch",
    "versions": "Another checkout against this one",
}
BY_NAME_ONLY = ("gpu", "versions")  # a GPU or another checkout has to be there
HEAD = """# Benchmarks

`make bench` writes this page. Each section is one script and one command. Cases take turns, round by round. Ratios are
taken within a round, because a shared machine changes its speed. Figures are medians, with the least and the greatest
in brackets. CPU seconds are processor time; other times are those of the clock. No test asserts any of these figures.
"""


def purpose(script: Path) -> str:
    """Return the docstring of a script: what it measures, and how."""
    return ast.get_docstring(ast.parse(script.read_text())) or ""


def measure(name: str, options: Sequence[str]) -> None:
    """Run one benchmark and store its report in `results/`."""
    results = FOLDER / "results"
    results.mkdir(exist_ok=True)
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--out", str(results / f"{name}.md"), *options]
    subprocess.run(command, check=True)


def page() -> str:
    """Return the page with all reports."""
    sections = [HEAD]
    for name, title in TITLES.items():
        report = FOLDER / "results" / f"{name}.md"
        if report.is_file():
            sections.append(f"## {title}\n\n{purpose(FOLDER / f'{name}.py')}\n\n{report.read_text().strip()}\n")
    return "\n".join(sections)


if __name__ == "__main__":
    words = sys.argv[1:]
    first_option = next((at for at, word in enumerate(words) if word.startswith("--")), len(words))
    for name in words[:first_option] or [name for name in TITLES if name not in BY_NAME_ONLY]:
        if name != "page":
            measure(name, words[first_option:])
        (FOLDER / "README.md").write_text(page())
