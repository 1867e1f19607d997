"""Each heavy library stays in its rooms. lint-imports checks imports between rooms and folders (pyproject.toml)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Libraries that importing a module of a room must not load; calling a function may load them.
BANNED = {
    "store": {"torch", "transformers", "accelerate", "dask", "datasets"},
    "capture": {"dask"},
    "analysis": {"datasets", "transformers", "accelerate"},
}


def loaded_after(code: str) -> set[str]:
    """Return the top-level modules that a new interpreter has loaded after it ran `code`."""
    script = f"import sys\n{code}\nprint(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(shown.stdout.split())


@pytest.mark.parametrize("room", BANNED)
def test_heavy_libraries_stay_in_their_rooms(room: str) -> None:
    files = [path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / room).rglob("*.py"))]
    assert len(files) > 30
    code = "\n".join(f"import residua.{'.'.join(file.parts)}" for file in files)
    assert not loaded_after(code) & BANNED[room]


def test_importing_residua_loads_nothing_heavy() -> None:
    heavy = {"torch", "zarr", "transformers", "numpy", "pyarrow", "dask"}
    assert not loaded_after("import residua; residua.analysis") & heavy


def test_reading_archives_needs_no_torch() -> None:
    assert not loaded_after("import residua; residua.open; residua.verify") & {"torch", "transformers", "dask"}


def test_workers_that_probe_or_take_statistics_load_no_torch() -> None:
    modules = "import residua.analysis.probes.probe, residua.analysis.stats.stats"
    job = "from residua.analysis.support.threads import one_thread\nwith one_thread(): pass"
    assert not loaded_after(f"{modules}\n{job}") & {"torch", "transformers"}


def test_the_command_line_starts_without_torch() -> None:
    assert not loaded_after("import residua.pipelines.cli.main") & {"torch", "transformers", "datasets"}


@pytest.mark.parametrize("room", ["store", "capture", "analysis", "pipelines"])
def test_a_folder_answers_one_question_and_says_which(room: str) -> None:
    assert len(list((ROOT / room).glob("*.py"))) <= 3
    for path in (ROOT / room).glob("*/__init__.py"):
        n_files = len(list(path.parent.glob("*.py")))
        assert 3 <= n_files <= 14, f"{path.parent} has {n_files} files"
        (docstring,) = ast.parse(path.read_text()).body
        assert isinstance(docstring, ast.Expr), f"{path} holds more than its docstring"
