"""The wheel holds every module and only `residua` at top level, and every dependency is declared."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from residua.store.base.extras import PACKAGES

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name not in ("residua", "tests"))


def run(*words: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=240, check=False, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy of the sources, so that the build leaves nothing among them."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("made")
    without_caches = shutil.ignore_patterns("__pycache__")
    for folder in ("residua", *ROOMS):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=without_caches)
    for name in ("pyproject.toml", PROJECT["project"]["readme"]):
        shutil.copy(ROOT / name, source / name)
    options = [
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--disable-pip-version-check",
        "--wheel-dir",
        str(made),
    ]
    built = run(sys.executable, "-m", "pip", "wheel", ".", *options, cwd=source)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = made.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_every_module_of_every_room_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {f"residua/{path.name}" for path in (ROOT / "residua").glob("*.py")}
    modules |= {f"residua/{path.relative_to(ROOT)}" for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert len(modules) > 150
    held = {name for name in names if ".dist-info/" not in name}
    assets = {f"residua/{path.relative_to(ROOT)}" for path in (ROOT / "analysis/page/assets").iterdir()}
    assert {"index.html", "page.css", "page.js"} <= {Path(name).name for name in assets}
    assert held == modules | assets | {"residua/py.typed", "residua/store/FORMAT.md"}


@pytest.mark.slow
def test_the_wheel_is_imported_as_residua_only(wheel: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util, residua, residua.store.format.plan;"
        f"print(residua.__file__); print([importlib.util.find_spec(room) for room in {ROOMS}])"
    )
    shown = run(sys.executable, "-c", code, cwd=tmp_path, env={"PYTHONPATH": str(wheel), "PATH": ""})
    assert shown.returncode == 0, shown.stderr
    file, specs = shown.stdout.splitlines()
    assert file.startswith(str(wheel))
    assert specs == str([None] * len(ROOMS))


@pytest.mark.slow
def test_the_command_is_installed(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "residua = residua.pipelines.cli.main:main" in archive.read(entry_points).decode()


def test_there_are_four_rooms() -> None:
    assert ROOMS == ["analysis", "capture", "pipelines", "store"]


def test_the_lists_of_rooms_agree_with_the_folders() -> None:
    tool = PROJECT["tool"]
    folders = [path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("__init__.py")]
    packages = ["residua", *(".".join(("residua", *folder.parts)) for folder in folders)]
    assert sorted(tool["setuptools"]["packages"]) == sorted(packages)
    assert tool["setuptools"]["package-dir"] == {"residua": "residua", **{f"residua.{room}": room for room in ROOMS}}
    assert set(tool["coverage"]["run"]["source"]) == {"residua", *ROOMS}
    assert sorted(tool["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]) == ROOMS
    for folder in tool["mypy"]["files"]:
        assert (ROOT / folder).is_dir(), f"pyproject.toml lists {folder} for mypy, but there is no such folder"


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_is_linked_into_the_package(room: str) -> None:
    link = ROOT / "residua" / room
    assert link.is_symlink()
    assert link.readlink() == Path("..") / room


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("line", ["import {}\n{}", "import {}.x\n{}", "from {} import x\nx"])
def test_a_bare_room_is_banned(room: str, line: str) -> None:
    words = ("ruff", "check", "--select", "TID251", "--no-cache", "--stdin-filename", "tests/any.py", "-")
    found = run(*words, cwd=ROOT, input=line.format(room, room) + "\n")
    assert found.returncode == 1, found.stdout + found.stderr
    assert f"import residua.{room}" in found.stdout


@cache
def distributions_of() -> Mapping[str, list[str]]:
    """Return the distributions of every module that is installed; finding them takes a second."""
    return packages_distributions()


def third_party(folder: Path) -> Iterator[str]:
    """Yield the distributions of the modules that the files of a folder import, at any level."""
    distributions = distributions_of()
    for path in folder.glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in {module.split(".")[0] for module in modules} - sys.stdlib_module_names:
                yield from distributions.get(module, [])[:1] if module not in LOCAL else []


LOCAL = {"residua", "tests", "benchmarks", "scripts", "examples"}


def declared(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[^A-Za-z0-9_.-]", requirement)[0]) for requirement in requirements}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def extra(name: str) -> set[str]:
    """Return what an extra installs, including the extras that it names."""
    found = set()
    for requirement in PROJECT["project"]["optional-dependencies"][name]:
        nested = re.match(r"residua\[(.*)\]", requirement)
        found |= set.union(*map(extra, nested[1].split(","))) if nested else declared([requirement])
    return found


BASE = declared(PROJECT["project"]["dependencies"])
NEEDS = {
    "residua": [],
    "store": ["capture", "reader-tests"],
    "capture": ["capture"],
    "analysis": ["analysis"],
    "pipelines": ["all"],
}
"""The extras that a room may import from. In the store only functions that return tensors import torch
(test_rooms), and only `to_xarray` xarray."""


OF_THE_MODEL = {"bitsandbytes"}
"""Packages that are imported only where the user's model has weights of theirs, so that they are installed."""


@pytest.mark.parametrize("folder", NEEDS)
def test_every_import_of_a_room_is_a_dependency_or_in_its_extra(folder: str) -> None:
    missing = {normal(name) for name in third_party(ROOT / folder)} - BASE.union(*map(extra, NEEDS[folder]))
    missing -= OF_THE_MODEL
    assert not missing, f"{folder} imports {sorted(missing)}, which pyproject.toml does not declare"


def test_messages_name_the_extras_of_the_project() -> None:
    assert PACKAGES.keys() == {"capture", "analysis"}
    for name, modules in PACKAGES.items():
        distributions = {normal(distributions_of()[module][0]) for module in modules}
        assert distributions == extra(name) - BASE


def test_every_import_of_the_tests_is_declared() -> None:
    missing = {normal(name) for name in third_party(ROOT / "tests")} - BASE - extra("dev")
    assert not missing, f"tests import {sorted(missing)}, which the dev extra does not declare"


def test_every_dependency_is_pinned_for_the_environment() -> None:
    pinned = declared((ROOT / "constraints.txt").read_text().splitlines())
    wanted = BASE | extra("dev")
    assert not wanted - pinned, f"constraints.txt does not pin {sorted(wanted - pinned)}"
