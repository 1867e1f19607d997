"""Links between pages point to existing files, and docs/architecture.md names every folder."""

import re
import tomllib
from pathlib import Path

import pytest

from tests.pages import ROOT

PAGES = [path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "store/FORMAT.md"]]
PAGES += [Path("benchmarks/README.md"), *(path.relative_to(ROOT) for path in ROOT.glob("notebooks/*.ipynb"))]
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")
NAMED = re.compile(r"`((?:analysis|benchmarks|capture|docs|pipelines|scripts|store|tests)/[\w/]+\.\w+)`")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    missing = {target for target in LINK.findall(prose) if not (folder / target).exists()}
    missing |= {name for name in NAMED.findall(text) if not (ROOT / name).exists()}
    assert not missing, f"{page} names files that do not exist: {sorted(missing)}"


def test_the_architecture_page_has_every_folder_in_the_order_of_the_contracts() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    page = (ROOT / "docs" / "architecture.md").read_text()
    for contract in contracts:
        room = contract.get("containers", [""])[0].removeprefix("residua.")
        if room:
            (row,) = re.findall(rf"^\| \[{room}\].*$", page, re.MULTILINE)
            layers = [name.strip() for layer in contract["layers"] for name in layer.split("|")]
            assert re.findall(r"`(\w+)`", row) == layers
