"""Requests that do not fit are refused in the user's words, before the model runs."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import residua
from residua.store.base.errors import NotCapturedError, PlanError, UnknownSiteError
from residua.store.read.archive import Archive
from tests.calls import count_calls
from tests.capture.replay_samples import EVEN, captured, model_of
from tests.stopped import take_back

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
    handle = count_calls(model, ran)
    try:
        with pytest.raises(error, match=match), residua.replay(model, archive, **{"examples": EVEN, **options}) as run:
            assert run.logits
    finally:
        handle.remove()
    assert not ran


ADD: dict[str, Any] = {"edit": "add", "site": "resid_post.1", "vector": [0.0] * WIDTH}
EDITS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({**ADD, "site": "resid_pos.1"}, UnknownSiteError, r"edit 1 .*'resid_pos'.*resid_post"),
    ({**ADD, "site": "resid_post.7"}, UnknownSiteError, r"edit 1 .*resid_post\.7.*resid_post\.0-2"),
    ({**ADD, "vector": [0.0] * 31}, PlanError, r"resid_post\.1.*\(32,\).*31"),
    ({**ADD, "vector": [1.0]}, PlanError, r"resid_post\.1.*\(32,\).*\(1,\)"),
    ({**ADD, "examples": [5]}, PlanError, r"example 5\b.* 5\b"),
    ({**ADD, "rows": [25]}, PlanError, r"row 25\b.* 24 rows"),
    ({**ADD, "positions": [12]}, PlanError, "no position 12: .* 12 tokens"),
    ({**ADD, "positions": [7], "examples": [2]}, PlanError, "no position 7: .* 7 tokens"),
    ({**ADD, "where": {"lable": "a"}}, PlanError, r"column 'lable'.*label"),
    ({**ADD, "heads": [0]}, PlanError, r"resid_post\.1.*heads"),
    ({**ADD, "channels": [32]}, PlanError, r"resid_post\.1.*32 channels.*channel 32"),
    ({"edit": "zero", "site": "z.1", "heads": [4]}, PlanError, r"z\.1.*4 heads.*head 4"),
    ({"edit": "zero", "site": "logits_top3.values"}, PlanError, r"logits_top3\.values"),
    ({"edit": "mean", "site": "pattern.1"}, PlanError, r"mean.*pattern\.1.* z"),
    ({"edit": "mean", "site": "resid_mid.1"}, PlanError, r"resid_mid\.1.*resid_post\.0"),
    ({"edit": "set", "site": "resid_post.1", "to": "stored", "positions": [3]}, PlanError, "position 3 of example 0"),
    ({"edit": "swap", "site": "resid_post.1", "source": 9}, PlanError, "example 9"),
    ({"edit": "swap", "site": "resid_post.1", "source": {7: 0}}, PlanError, r"example 7\b.* 5\b"),
    ({"edit": "swap", "site": "resid_post.1", "source": 0, "align": [[12, 0]]}, PlanError, "position 12"),
    ({"edit": "noise", "site": "resid_post.1", "std": 1e39}, PlanError, r"std.*1e\+39.*float32"),
    ({**ADD, "vector": [1e300] * WIDTH, "scale": 1e300}, PlanError, r"vector.*inf.*float32"),
    ({"edit": "overlay", "site": "resid_post.1", "overlay": Path("nowhere")}, PlanError, r"overlay.*nowhere"),
    ({"edit": "project_out", "site": "resid_post.1", "directions": [[0.0] * WIDTH]}, PlanError, "directions"),
    ({"edit": "project_out", "site": "resid_post.1", "directions": [1.0]}, PlanError, r"width 32.*\(1, 1\)"),
    ({"edit": "lens", "site": "resid_post.1", "lens": Path("nowhere")}, PlanError, r"lens.*nowhere"),
    ({"edit": "mean", "site": "resid_post.1", "archive": Path("nowhere")}, PlanError, r"archive.*nowhere"),
]


@pytest.mark.parametrize("case", range(len(EDITS)))
def test_an_edit_that_does_not_fit(llama: Given, case: int) -> None:
    edit, error, match = EDITS[case]
    refused(llama, error, match, edits=[edit])


def test_sites_and_examples_that_do_not_exist(llama: Given) -> None:
    refused(llama, UnknownSiteError, r"'resid_pre\.1'.*resid_post\.0-2", at="resid_pre.1")
    refused(llama, PlanError, r"pattern\.1.* q, k, v or z", at="pattern.1")
    refused(llama, PlanError, r"resid_post\.1.*resid_post\.0", at=["resid_post.0", "resid_post.1"])
    refused(llama, PlanError, r"\[9\].* 5\b", examples=[0, 9])
    refused(llama, PlanError, "examples.*at least one", examples=[])
    below = {"edit": "zero", "site": "attn_out.1"}
    refused(
        llama,
        PlanError,
        r"edit 1 .*attn_out\.1.*below resid_post\.1",
        at="resid_post.1",
        edits=[below],
    )
    refused(llama, PlanError, r"z\.1.*below resid_post\.1", at="resid_post.1", keep="z.1")


def test_what_float16_cannot_hold(tmp_path: Path) -> None:
    model = model_of("llama", torch.float16)
    archive = captured(model, tmp_path / "a", sites="resid_post.1")
    refused((model, archive), PlanError, r"7e\+04.*float16", edits=[{**ADD, "vector": [7e4] * 32}])
    huge = {"edit": "scale", "site": "resid_post.1", "by": 60000}
    with (
        pytest.raises(PlanError, match=r"edit 1 .*scale at resid_post\.1.*float16"),
        residua.replay(model, archive, examples=EVEN, edits=[huge]) as run,
    ):
        assert run.logits


def test_stored_rows_that_float16_cannot_hold(tmp_path: Path) -> None:
    model = model_of("llama")
    with residua.tap(model, "resid_post.1", lambda _site, x: x + 1e6):
        archive = captured(model, tmp_path / "a", sites="resid_post.1")
    half = model_of("llama", torch.float16)
    given, said = (half, archive), r"stored rows of resid_post\.1.*float16"
    refused(given, PlanError, said, at="resid_post.1", force=True)
    swap = {"edit": "swap", "site": "resid_post.1", "source": 0}
    refused(given, PlanError, rf"edit 1 .*swap at resid_post\.1.*{said}", edits=[swap], force=True)
    mean = {"edit": "mean", "site": "resid_post.1"}
    refused(given, PlanError, r"edit 1 .*mean.*1e\+06", edits=[mean], force=True)


def test_an_overlay_of_another_plan(llama: Given, tmp_path: Path) -> None:
    model, _ = llama
    other = captured(model, tmp_path / "b", sites="resid_post.1")
    overlay = residua.overlay(other, tmp_path / "overlay")
    edit = {"edit": "overlay", "site": "resid_post.1", "overlay": overlay.path}
    refused(llama, PlanError, r"edit 1 .*overlay.*another plan", edits=[edit])


def test_rows_of_an_overlay_that_cannot_go_in(llama: Given, tmp_path: Path) -> None:
    model, archive = llama
    overlay = residua.overlay(archive, tmp_path / "overlay", sites="resid_post.1")
    edit = {"edit": "overlay", "site": "resid_post.1", "overlay": overlay.path}
    for value, words in ((np.inf, "inf"), (np.nan, "nan")):
        overlay.write("resid_post.1", [3], [[value, *[0.0] * (WIDTH - 1)]])
        refused(llama, PlanError, rf"edit 1 .*row 3 of resid_post\.1.*\b{words}\b", edits=[edit])
    overlay.write("resid_post.1", [3], np.full((1, WIDTH), 7e4))
    half = model_of("llama", torch.float16)
    refused((half, archive), PlanError, r"row 3 .*float16", edits=[edit], force=True)
    with residua.replay(model, archive, examples=EVEN, edits=[edit], keep="resid_post.1") as run:
        assert (run["resid_post.1"][0][3] == 7e4).all()


def test_a_mean_of_what_is_no_number(tmp_path: Path) -> None:
    model = model_of("llama")
    with residua.tap(model, "resid_post.2", lambda _site, x: x / 0):
        archive = captured(model, tmp_path / "a", sites="resid_post.2")
    edit = {"edit": "mean", "site": "resid_post.2"}
    refused((model, archive), PlanError, r"edit 1 .*mean.*NaN.*resid_post\.2", edits=[edit])


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """Two examples with a score of NaN, one without captured rows, and a column of lists."""
    model, out = model_of("llama"), tmp_path_factory.mktemp("odd") / "a"
    kept = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    columns: dict[str, Any] = {"score": [np.nan, np.nan, 2.0, 1.0], "lists": [[1], [], [], []]}
    with residua.Recorder(model, sites="resid_post.1", out=out, codec="raw") as recorder, torch.no_grad():
        recorder.annotate(columns=columns, keep=kept)
        model(input_ids=torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6], [9, 4, 3, 3], [11, 12, 3, 3]]))
    return model, residua.open(out)


def test_classes_without_rows_and_classes_of_nan(odd: Given, llama: Given) -> None:
    model, archive = odd
    edit: dict[str, Any] = {"edit": "mean", "site": "resid_post.1", "column": "score"}
    said = r"edit 1 .*mean at resid_post\.1.*"
    refused(odd, NotCapturedError, said + r"score == 2\.0", examples=[2], edits=[edit])
    by_label = {**edit, "column": "label"}
    refused(llama, PlanError, r"column 'label'", edits=[{**by_label, "archive": archive.path}])
    refused(odd, PlanError, r"column 'lists'", examples=[0], edits=[{**edit, "column": "lists"}])
    with residua.replay(model, archive, examples=[1, 0], edits=[edit], keep="resid_post.1") as run:
        wanted = torch.from_numpy(np.asarray(archive["resid_post.1"][:6], np.float64).mean(0)).float()
        for rows in run["resid_post.1"]:
            torch.testing.assert_close(rows, wanted.expand_as(rows), rtol=1e-6, atol=1e-6)


def test_a_class_that_another_archive_does_not_have(llama: Given, tmp_path: Path) -> None:
    other = residua.capture_dataset(
        llama[0], [{"input_ids": [5, 6], "label": "b"}], out=tmp_path / "b", sites="resid_post.1"
    ).archive
    edit = {"edit": "mean", "site": "resid_post.1", "column": "label", "archive": other.path}
    refused(llama, PlanError, rf"label == 'a'.*{re.escape(str(other.path))}", examples=[0], edits=[edit])


def test_an_example_without_rows_and_edits_that_change_nothing(odd: Given) -> None:
    swap: dict[str, Any] = {"edit": "swap", "site": "resid_post.1", "source": 2}
    said = "edit 1 .*stored row.*position 1"
    refused(odd, PlanError, said, examples=[0], edits=[{**swap, "positions": [1]}])
    zero: dict[str, Any] = {"edit": "zero", "site": "final", "tokens": [4]}
    idle = [swap, {**zero, "tokens": [5]}, {**zero, "where": {"score": 1.0}}]
    model, archive = odd
    with residua.replay(model, archive, examples=[1, 2], edits=[zero, *idle], keep="final") as run:
        changes_nothing = [note.partition(" (")[0] for note in run.notes if "changes nothing" in note]
        assert changes_nothing == ["edit 2", "edit 3", "edit 4"]
        assert [len(rows) for rows in run["final"]] == [2, 0]
        changed = run.logits[1][1]
    assert torch.equal(changed, model.lm_head(model.model.norm(torch.zeros(1, WIDTH)))[0])


def test_an_archive_that_is_not_sealed_serves_its_committed_rows(tmp_path: Path) -> None:
    model = model_of("llama")
    archive = captured(model, tmp_path / "a", sites="resid_post.1,logits", rows_per_shard=16)
    logits = archive["logits"].torch()
    take_back(archive.path, 1)
    partial = residua.open(archive.path)
    with residua.replay(model, partial, examples=[0], at="resid_post.1") as run:
        assert any(str(archive.path) in note and "not sealed" in note and "29 rows" in note for note in run.notes)
        torch.testing.assert_close(run.logits[0], logits[:12])
    refused((model, partial), NotCapturedError, "rows from 16 on", examples=[1], at="resid_post.1")
    swap = {"edit": "swap", "site": "resid_post.1", "source": 1}
    said = r"edit 1 .*swap at resid_post\.1.*rows from 16 on"
    refused((model, partial), NotCapturedError, said, examples=[0], edits=[swap])
    mean = {"edit": "mean", "site": "resid_post.1"}
    with residua.replay(model, partial, examples=[1], edits=[mean], keep="resid_post.1") as run:
        committed = np.r_[:16, 32:45]
        wanted = np.asarray(partial["resid_post.1"][committed], np.float64).mean(0)
        np.testing.assert_allclose(run["resid_post.1"][0][3], wanted, rtol=1e-5, atol=1e-6)


def test_a_model_without_tokens_is_refused(llama: Given) -> None:
    with (
        pytest.raises(PlanError, match=r"Linear.*token ids"),
        residua.replay(torch.nn.Linear(2, 2), llama[1], examples=EVEN),
    ):
        pass
