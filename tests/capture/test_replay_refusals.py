"""What does not fit is refused in the user's words, before the model runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import residua
from residua.store.archive import Archive
from residua.store.errors import NotCapturedError, PlanError, UnknownSiteError
from tests.capture.replaying import EVEN, captured, model_of

Given = tuple[Any, Archive]
WIDTH = 32


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Given:
    model = model_of("llama")
    folder = tmp_path_factory.mktemp("llama")
    sites = "resid_post.*,pattern.1,z.1,logits_top3,final"
    archive = captured(model, folder / "a", sites=sites, positions="every:2")
    model.set_attn_implementation("eager")
    return model, archive


def refused(given: Given, error: type[Exception], match: str, **options: Any) -> None:
    model, archive = given
    ran: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(error, match=match), residua.replay(model, archive, **{"examples": EVEN, **options}) as run:
            assert run.logits
    finally:
        handle.remove()
    assert not ran


ADD: dict[str, Any] = {"edit": "add", "site": "resid_post.1", "vector": [0.0] * WIDTH}
EDITS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({**ADD, "site": "resid_pos.1"}, UnknownSiteError, r"edit 1 \(add\).*'resid_pos'.*Did you mean resid_post"),
    ({**ADD, "site": "resid_post.7"}, UnknownSiteError, r"edit 1 \(add\): Site 'resid_post\.7'.*resid_post\.0-2"),
    ({**ADD, "vector": [0.0] * 31}, PlanError, r"resid_post\.1 has rows of shape \(32,\), and the vector has .*31"),
    ({**ADD, "vector": [1.0]}, PlanError, r"resid_post\.1 has rows of shape \(32,\), and the vector has shape \(1,\)"),
    ({**ADD, "examples": [5]}, PlanError, "there is no example 5: the archive has 5, counted from 0"),
    ({**ADD, "rows": [25]}, PlanError, "there is no row 25: the archive has 24 rows"),
    ({**ADD, "positions": [12]}, PlanError, "there is no position 12: the longest example chosen has 12 tokens"),
    ({**ADD, "positions": [7], "examples": [2]}, PlanError, "position 7: the longest example chosen has 7 tokens"),
    ({**ADD, "where": {"lable": "a"}}, PlanError, "the examples have no column 'lable'; they have label"),
    ({**ADD, "heads": [0]}, PlanError, r"resid_post\.1 has no heads"),
    ({**ADD, "channels": [32]}, PlanError, r"resid_post\.1 has 32 channels: there is no channel 32"),
    ({"edit": "zero", "site": "z.1", "heads": [4]}, PlanError, r"z\.1 has 4 heads: there is no head 4"),
    ({"edit": "zero", "site": "logits_top3.values"}, PlanError, "does not hold one entry a token"),
    ({"edit": "mean", "site": "pattern.1"}, PlanError, r"mean does not fit pattern\.1.*use z"),
    ({"edit": "mean", "site": "resid_mid.1"}, PlanError, r"does not store resid_mid\.1; it stores resid_post\.0"),
    ({"edit": "set", "site": "resid_post.1", "to": "stored", "positions": [3]}, PlanError, "position 3 of example 0"),
    ({"edit": "swap", "site": "resid_post.1", "source": 9}, PlanError, "there is no example 9"),
    ({"edit": "project_out", "site": "resid_post.1", "directions": [[0.0] * WIDTH]}, PlanError, "no direction"),
    ({"edit": "project_out", "site": "resid_post.1", "directions": [1.0]}, PlanError, r"width 32.*\(1, 1\)"),
    ({"edit": "lens", "site": "resid_post.1", "lens": Path("nowhere")}, PlanError, "there is no lens at nowhere"),
    ({"edit": "mean", "site": "resid_post.1", "archive": Path("nowhere")}, PlanError, "no archive at nowhere"),
]


@pytest.mark.parametrize("case", range(len(EDITS)))
def test_an_edit_that_does_not_fit(llama: Given, case: int) -> None:
    edit, error, match = EDITS[case]
    refused(llama, error, match, edits=[edit])


def test_sites_and_examples_that_there_are_not(llama: Given) -> None:
    refused(llama, UnknownSiteError, r"'resid_pre\.1'.*There are: resid_post\.0-2", at="resid_pre.1")
    refused(llama, PlanError, r"pattern\.1 cannot be put in", at="pattern.1")
    refused(
        llama, PlanError, r"put in at resid_post\.1 make those at resid_post\.0", at=["resid_post.0", "resid_post.1"]
    )
    refused(llama, PlanError, r"examples \[9\]: the archive has 5", examples=[0, 9])
    refused(llama, PlanError, "name at least one", examples=[])
    below = {"edit": "zero", "site": "attn_out.1"}
    refused(
        llama,
        PlanError,
        r"edit 1 \(zero at attn_out\.1\): it lies below resid_post\.1",
        at="resid_post.1",
        edits=[below],
    )
    refused(llama, PlanError, r"z\.1 was asked for: it lies below resid_post\.1", at="resid_post.1", keep="z.1")


def test_what_float16_cannot_hold(tmp_path: Path) -> None:
    model = model_of("llama", torch.float16)
    archive = captured(model, tmp_path / "a", sites="resid_post.1")
    refused(
        (model, archive), PlanError, "reaches 7e.04, more than float16 can hold", edits=[{**ADD, "vector": [7e4] * 32}]
    )
    huge = {"edit": "scale", "site": "resid_post.1", "by": 60000}
    with (
        pytest.raises(PlanError, match=r"edit 1 \(scale at resid_post\.1\) goes beyond what float16"),
        residua.replay(model, archive, examples=EVEN, edits=[huge]) as run,
    ):
        assert run.logits


def test_stored_rows_that_float16_cannot_hold(tmp_path: Path) -> None:
    model = model_of("llama")
    with residua.tap(model, "resid_post.1", lambda _site, x: x + 1e6):
        archive = captured(model, tmp_path / "a", sites="resid_post.1")
    half = model_of("llama", torch.float16)
    with (
        pytest.raises(PlanError, match=r"stored rows of resid_post\.1 hold values that float16"),
        residua.replay(half, archive, examples=EVEN, at="resid_post.1", force=True) as run,
    ):
        assert run.logits


def test_an_overlay_of_another_plan(llama: Given, tmp_path: Path) -> None:
    model, _ = llama
    other = captured(model, tmp_path / "b", sites="resid_post.1")
    overlay = residua.overlay(other, tmp_path / "overlay")
    edit = {"edit": "overlay", "site": "resid_post.1", "overlay": overlay.path}
    refused(llama, PlanError, r"edit 1 \(overlay\): .*an overlay of another plan", edits=[edit])


def test_an_archive_that_is_not_sealed_serves_its_committed_rows(tmp_path: Path) -> None:
    model = model_of("llama")
    archive = captured(model, tmp_path / "a", sites="resid_post.1,logits", rows_per_shard=16)
    whole = archive["logits"].torch()
    (archive.path / "commits" / "00000001-0000.json").unlink()
    part = residua.open(archive.path)
    with residua.replay(model, part, examples=[0], at="resid_post.1") as run:
        assert f"{archive.path} is not sealed: 29 rows are captured so far" in run.notes
        torch.testing.assert_close(run.logits[0], whole[:12])
    refused((model, part), NotCapturedError, "rows from 16 on are not captured yet", examples=[1], at="resid_post.1")
    mean = {"edit": "mean", "site": "resid_post.1"}
    with residua.replay(model, part, examples=[1], edits=[mean], keep="resid_post.1") as run:
        committed = np.r_[:16, 32:45]
        wanted = np.asarray(part["resid_post.1"][committed], np.float64).mean(0)
        np.testing.assert_allclose(run["resid_post.1"][0][3], wanted, rtol=1e-5, atol=1e-6)


def test_a_model_without_tokens_is_refused(llama: Given) -> None:
    with (
        pytest.raises(PlanError, match="Linear is no language model over token ids"),
        residua.replay(torch.nn.Linear(2, 2), llama[1], examples=EVEN),
    ):
        pass
