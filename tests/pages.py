"""Run the code of a documentation page."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def blocks(page: str, *sections: str, language: str = "python") -> list[str]:
    """Return the blocks of code of a page, or of some of its sections, in order.

    Args:
        page: Path of the page in the repository.
        sections: Titles of second level; without any, the full page.
        language: Language of the blocks.
    """
    text = (ROOT / page).read_text()
    chosen = [text.partition(f"\n## {title}\n")[2].partition("\n## ")[0] for title in sections] or [text]
    return [block for section in chosen for block in re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)]


def run(code: Iterable[str], names: dict[str, Any]) -> None:
    """Run blocks one after another; `names` holds their variables, before and after."""
    for block in code:
        exec(block, names)  # noqa: S102  # the test is about the page's own code
