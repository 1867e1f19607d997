"""Run the code of the pages for users of other libraries: where they show two ways, both give the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pages import ROOT, blocks, run


@pytest.mark.parametrize("page", ["docs/from-transformerlens.md", "docs/from-nnsight.md"])
def test_both_ways_give_the_same(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {"work": tmp_path}
    run(blocks(page), names)
    plain = names["run"].model(torch.tensor([names["run"].tokens[0]])).logits[0]
    torch.testing.assert_close(names["logits"], plain, atol=1e-4, rtol=0)  # patterns are read from eager attention
    edited = names.get("ablated") or names["steered"]
    by_hand = names["logits_of_the_same"] if "ablated" in names else names["by_function"]
    torch.testing.assert_close(edited.logits[0], by_hand, atol=1e-4, rtol=0)
    assert not torch.equal(edited.logits[0], plain)
