"""Run the code of the pages for users of other libraries: where they show two ways, both give the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

import residua
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


def test_rows_for_a_trainer_and_the_loss_with_an_autoencoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {"work": tmp_path}
    run(blocks("docs/from-saelens.md"), names)
    archive, feed = names["archive"], names["feed"]
    assert names["site"] == "resid_post.3"
    assert names["first"].shape == (64, 128)
    batches = 1 + 2 * names["loader"].batches_per_epoch  # into a third epoch
    rows = torch.cat([next(feed) for _ in range(batches)])
    stored = {tuple(row) for row in archive["resid_post.3"][:][archive.rows.position[:] > 0].tolist()}
    assert {tuple(row) for row in rows.tolist()} <= stored
    scores = archive["resid_post.3"][:].astype(float) @ names["W_enc"][:, 7].double().numpy()
    assert names["strongest"]["score"][0].as_py() == pytest.approx(scores.max())
    text = "The list is sorted in place, and the list is returned."
    plain = residua.run("models/pydoc-1m", [text, "def main(): pass"] * 4, device="cpu")
    assert names["whole"] == pytest.approx(float(plain.metric("loss")), abs=1e-4)
    assert names["reconstructed"] == pytest.approx(names["whole"], abs=1e-5)
    assert names["ablated"] > names["whole"]
    assert names["recovered"] == pytest.approx(1, abs=1e-4)
