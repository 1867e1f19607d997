"""The four rooms import in one direction, and each heavy library stays where it belongs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "store": {"store"},
    "capture": {"store", "capture"},
    "analysis": {"store", "analysis"},
    "pipelines": {"store", "capture", "analysis", "pipelines"},
}
# Libraries that a room must not import at module level; a function may import them when it is called.
BANNED = {
    "store": {"torch", "transformers", "accelerate", "dask", "datasets"},
    "capture": {"dask", "datasets"},
    "analysis": {"datasets"},
    "pipelines": set(),
}


def imports(path: Path, *, module_level: bool) -> Iterator[str]:
    """Yield the dotted names that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    if module_level:
        inside = {
            child
            for node in nodes
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(node)
            for child in ast.walk(node)
        }
        nodes = [node for node in nodes if node not in inside]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module or ""


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def modules() -> list[tuple[str, Path]]:
    return [(room, path) for room in ALLOWED for path in sorted((ROOT / room).glob("*.py"))]


@pytest.mark.parametrize(("room", "path"), modules(), ids=lambda value: getattr(value, "name", value))
def test_rooms_import_in_one_direction(room: str, path: Path) -> None:
    rooms = {name.split(".")[1] for name in imports(path, module_level=False) if name.startswith("residua.")}
    assert rooms <= ALLOWED[room], f"{path} imports {rooms - ALLOWED[room]}"
    bare = {name.split(".")[0] for name in imports(path, module_level=False)} & ALLOWED.keys()
    assert not bare, f"{path} imports {bare} from the repository root instead of residua"


@pytest.mark.parametrize(("room", "path"), modules(), ids=lambda value: getattr(value, "name", value))
def test_heavy_libraries_stay_in_their_rooms(room: str, path: Path) -> None:
    heavy = {name.split(".")[0] for name in imports(path, module_level=True)} & BANNED[room]
    assert not heavy, f"{path} imports {heavy} at module level"


def loaded_after(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has loaded after running `code`."""
    script = f"import sys\n{code}\nprint(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(shown.stdout.split())


def test_importing_residua_loads_nothing_heavy() -> None:
    heavy = {"torch", "zarr", "transformers", "numpy", "pyarrow", "dask"}
    assert not loaded_after("import residua; residua.analysis") & heavy


def test_reading_archives_needs_no_torch() -> None:
    assert not loaded_after("import residua; residua.open; residua.verify") & {"torch", "transformers", "dask"}


def test_the_command_line_starts_without_torch() -> None:
    assert not loaded_after("import residua.pipelines.cli") & {"torch", "transformers", "datasets"}
