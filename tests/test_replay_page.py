"""Run the code of docs/replay.md, and compare the figures that the page quotes."""

import re
from typing import Any

import numpy as np
import pytest
import torch

import residua
from residua.store.edits.edit import KINDS
from residua.store.edits.parser import parse_edits
from tests.pages import ROOT, blocks, run

PAGE = ROOT / "docs" / "replay.md"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the page's code, and return its variables."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"work": tmp_path_factory.mktemp("work")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        run(blocks("docs/replay.md"), found)
    return found


def test_stored_rows_give_what_was_captured(names: dict[str, Any]) -> None:
    for example in range(16):
        stored = torch.from_numpy(names["archive"].example(example, "resid_post.4")["resid_post.4"])
        assert torch.equal(names["rows"][example], stored)
    assert names["logits"][0].shape == (101, 1024)


def test_edits_do_what_the_page_says(names: dict[str, Any]) -> None:
    assert names["gain"] > 1
    assert 0 < names["divergence"] < 1
    assert [len(tokens) <= 20 for tokens in names["story"]] == [True]
    assert names["ablated"] > 0
    assert (np.array(names["recovered"]) > 0).tolist() == [False, False, False, True, True, True]
    assert names["by_head"].shape == (60, 4)
    assert names["moved"][:50].max() == 0 < names["moved"][50]


def test_the_tables_cover_the_full_archive(names: dict[str, Any]) -> None:
    assert len(names["by_example"]) == 16
    assert len(names["by_token"]) == 16 * 101
    listed = PAGE.read_text().partition("A line of a token")[2].partition("`examples`, `rows`")[0]
    documented = set(re.findall(r"`(\w+)`", listed)) - {"tokens"}
    assert documented == set(names["by_token"].columns) | {"top1_agreement", "n_tokens", "kl_max"}
    assert set(names["by_example"].columns) <= documented
    assert 0 < names["cost"].kl_mean < 1e-2


def test_what_follows_is_an_archive(names: dict[str, Any]) -> None:
    following, archive = names["following"], names["archive"]
    assert following.sites == ("resid_post.3", "resid_post.4", "q.5", "k.5", "resid_post.5")
    assert following.is_sealed
    assert following.n_rows == archive.n_rows
    shift = names["shift"]
    with residua.replay(names["model"], archive, examples=[0], at="resid_post.2", edits=names["halve"]) as run:
        np.testing.assert_allclose(run["resid_post.5"][0], following.example(0)["resid_post.5"], rtol=1e-4, atol=1e-3)
    assert 0 < shift["resid_post.3"] < shift["resid_post.5"]


def test_sweeps_find_the_two_cells_that_the_page_names(names: dict[str, Any]) -> None:
    grid = names["grid"]
    estimate = names["estimate"].groupby(["site", "position"])["recovered"].mean().unstack()
    circuit = {("attn_out.1", 11), ("attn_out.3", 60)}
    assert {cell for cell, value in grid.stack().items() if value > 0.5} == circuit
    assert estimate[60]["attn_out.3"] == pytest.approx(1.2, abs=0.05)
    assert estimate[11]["attn_out.1"] == pytest.approx(0.01, abs=0.05)
    assert (names["work"] / "patched/cells.png").is_file()
    heads = names["by_heads"]
    assert heads[1]["z.1"] > 0.8
    assert heads.stack().drop(("z.1", 1)).abs().max() < 0.5


def test_the_induction_heads_copy(names: dict[str, Any]) -> None:
    """Compare to 0.02 nats: other processors round differently, and the table has two digits."""
    table = dict(re.findall(r"^\| (none|block \d(?:, one head at a time)?) \| ([\d., ]+) \|$", PAGE.read_text(), re.M))
    quoted = {name: [float(number) for number in cell.split(",")] for name, cell in table.items()}
    assert len(quoted) == 6
    found = {f"block {layer}": [loss] for layer, loss in names["without"].items()}
    found |= {"none": [names["second_copy"].item()], "block 3, one head at a time": names["without_one"]}
    for name, losses in quoted.items():
        np.testing.assert_allclose(losses, found[name], atol=0.02, rtol=0)
    assert names["without"][3] > 6
    assert max(names["without"][layer] for layer in (2, 4, 5)) < 0.5
    assert names["first_copy"] > 7


def test_the_page_lists_every_edit() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.M)
    assert listed == list(KINDS)
    assert parse_edits([{"edit": "zero", "site": "final"}])
