"""Each heavy library stays in its rooms. lint-imports checks imports between rooms and folders (pyproject.toml)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "zarr", "transformers", "numpy", "pyarrow", "dask"}


def all_of(room: str) -> str:
    """Return code that imports every module of a room."""
    files = [path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / room).rglob("*.py"))]
    assert len(files) > 30
    return "\n".join(f"import residua.{'.'.join(file.parts)}" for file in files)


STEPS: dict[str, tuple[str, set[str]]] = {
    "the package": ("import residua; residua.analysis", HEAVY),
    "reading": ("residua.open; residua.verify", {"torch", "transformers", "dask"}),
    "the store": (all_of("store"), {"torch", "transformers", "accelerate", "dask", "datasets"}),
    "the command line": ("import residua.pipelines.cli.main", {"torch", "transformers", "datasets"}),
    "a worker that probes or takes statistics": (
        "import residua.analysis.probes.probe, residua.analysis.stats.stats\n"
        "from residua.analysis.support.threads import one_thread\n"
        "with one_thread(): pass",
        {"torch", "transformers"},
    ),
    "the analyses": (all_of("analysis"), {"datasets", "transformers", "accelerate"}),
}
"""What one interpreter does, step by step, and the libraries that it must not have loaded after each.

Importing a module must not load them; calling a function may."""


def loaded_after(*steps: str) -> list[set[str]]:
    """Return the top-level modules that a new interpreter has loaded after each of the steps."""
    shown = "\nprint(' '.join({name.split('.')[0] for name in sys.modules}))"
    script = "import sys\n" + "\n".join(step + shown for step in steps)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_heavy_libraries_stay_in_their_rooms() -> None:
    loaded = loaded_after(*(code for code, _ in STEPS.values()))
    for (step, (_, banned)), found in zip(STEPS.items(), loaded, strict=True):
        assert not found & banned, f"{step} loads {found & banned}"


def test_captures_load_no_dask() -> None:
    (loaded,) = loaded_after(all_of("capture"))
    assert "dask" not in loaded


@pytest.mark.parametrize("room", ["store", "capture", "analysis", "pipelines"])
def test_a_folder_answers_one_question_and_says_which(room: str) -> None:
    assert len(list((ROOT / room).glob("*.py"))) <= 3
    for path in (ROOT / room).glob("*/__init__.py"):
        n_files = len(list(path.parent.glob("*.py")))
        assert 3 <= n_files <= 14, f"{path.parent} has {n_files} files"
        (docstring,) = ast.parse(path.read_text()).body
        assert isinstance(docstring, ast.Expr), f"{path} holds more than its docstring"
