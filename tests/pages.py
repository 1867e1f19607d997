"""The code of a page of documentation, to be run as it stands there."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def blocks(page: str, *sections: str, language: str = "python") -> list[str]:
    """Return the blocks of code of a page, or of those sections of it, in their order.

    Args:
        page: Its path in the repository.
        sections: Titles of second order; the whole page if none is given.
        language: The language that the blocks are marked with.
    """
    text = (ROOT / page).read_text()
    parts = [text.partition(f"\n## {title}\n")[2].partition("\n## ")[0] for title in sections] or [text]
    return [block for part in parts for block in re.findall(rf"```{language}\n(.*?)```", part, re.DOTALL)]


def run(code: Iterable[str], names: dict[str, Any]) -> None:
    """Run blocks one after another, on the same `names`, which keep what they define."""
    for block in code:
        exec(block, names)  # noqa: S102  # the page's own code is what is tested
