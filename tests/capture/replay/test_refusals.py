"""What does not fit is refused in the user's words, before the model runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import residua
from residua.store.base.errors import NotCapturedError, PlanError, UnknownSiteError
from residua.store.read.archive import Archive
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
    ({**ADD, "positions": [12]}, PlanError, "no position 12: .* 12 tokens"),
    ({**ADD, "positions": [7], "examples": [2]}, PlanError, "no position 7: .* 7 tokens"),
    ({**ADD, "where": {"lable": "a"}}, PlanError, "the examples have no column 'lable'; they have label"),
    ({**ADD, "heads": [0]}, PlanError, r"resid_post\.1 has no heads"),
    ({**ADD, "channels": [32]}, PlanError, r"resid_post\.1 has 32 channels: there is no channel 32"),
    ({"edit": "zero", "site": "z.1", "heads": [4]}, PlanError, r"z\.1 has 4 heads: there is no head 4"),
    ({"edit": "zero", "site": "logits_top3.values"}, PlanError, "does not hold one entry a token"),
    ({"edit": "mean", "site": "pattern.1"}, PlanError, r"mean does not fit pattern\.1.*use z"),
    ({"edit": "mean", "site": "resid_mid.1"}, PlanError, r"does not store resid_mid\.1; it stores resid_post\.0"),
    ({"edit": "set", "site": "resid_post.1", "to": "stored", "positions": [3]}, PlanError, "position 3 of example 0"),
    ({"edit": "swap", "site": "resid_post.1", "source": 9}, PlanError, "there is no example 9"),
    ({"edit": "swap", "site": "resid_post.1", "source": {7: 0}}, PlanError, "there is no example 7: the archive has 5"),
    ({"edit": "swap", "site": "resid_post.1", "source": 0, "align": [[12, 0]]}, PlanError, "there is no position 12"),
    ({"edit": "noise", "site": "resid_post.1", "std": 1e39}, PlanError, r"std reaches 1e\+39, more than float32"),
    ({**ADD, "vector": [1e300] * WIDTH, "scale": 1e300}, PlanError, "the vector reaches inf, more than float32"),
    ({"edit": "overlay", "site": "resid_post.1", "overlay": Path("nowhere")}, PlanError, "no overlay at nowhere"),
    ({"edit": "project_out", "site": "resid_post.1", "directions": [[0.0] * WIDTH]}, PlanError, "directions"),
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
    given, said = (half, archive), r"stored rows of resid_post\.1 hold values that float16"
    refused(given, PlanError, said, at="resid_post.1", force=True)
    swap = {"edit": "swap", "site": "resid_post.1", "source": 0}
    refused(given, PlanError, rf"edit 1 \(swap at resid_post\.1\): {said}", edits=[swap], force=True)
    mean = {"edit": "mean", "site": "resid_post.1"}
    refused(given, PlanError, r"edit 1 \(mean\): the mean reaches 1e\+06", edits=[mean], force=True)


def test_an_overlay_of_another_plan(llama: Given, tmp_path: Path) -> None:
    model, _ = llama
    other = captured(model, tmp_path / "b", sites="resid_post.1")
    overlay = residua.overlay(other, tmp_path / "overlay")
    edit = {"edit": "overlay", "site": "resid_post.1", "overlay": overlay.path}
    refused(llama, PlanError, r"edit 1 \(overlay\): .*an overlay of another plan", edits=[edit])


def test_rows_of_an_overlay_that_cannot_go_in(llama: Given, tmp_path: Path) -> None:
    model, archive = llama
    overlay = residua.overlay(archive, tmp_path / "overlay", sites="resid_post.1")
    edit = {"edit": "overlay", "site": "resid_post.1", "overlay": overlay.path}
    for value, words in ((np.inf, "reaches inf"), (np.nan, "reaches nan")):
        overlay.write("resid_post.1", [3], [[value, *[0.0] * (WIDTH - 1)]])
        refused(llama, PlanError, rf"edit 1 .*: row 3 of resid_post\.1 {words}, which is no number", edits=[edit])
    overlay.write("resid_post.1", [3], np.full((1, WIDTH), 7e4))
    half = model_of("llama", torch.float16)
    refused((half, archive), PlanError, r"row 3 .* that float16 can hold", edits=[edit], force=True)
    with residua.replay(model, archive, examples=EVEN, edits=[edit], keep="resid_post.1") as run:
        assert (run["resid_post.1"][0][3] == 7e4).all()


def test_a_mean_of_what_is_no_number(tmp_path: Path) -> None:
    model = model_of("llama")
    with residua.tap(model, "resid_post.2", lambda _site, x: x / 0):
        archive = captured(model, tmp_path / "a", sites="resid_post.2")
    edit = {"edit": "mean", "site": "resid_post.2"}
    refused((model, archive), PlanError, r"edit 1 \(mean\): the mean is NaN at resid_post\.2", edits=[edit])


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """Two examples with a score of NaN, one without a row that was kept, and a column of lists."""
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
    said = r"edit 1 \(mean at resid_post\.1\): the mean of rows with "
    refused(odd, NotCapturedError, said + r"score == 2\.0: .* has no captured row", examples=[2], edits=[edit])
    by_label = {**edit, "column": "label"}
    refused(llama, PlanError, "the examples have no column", edits=[{**by_label, "archive": archive.path}])
    refused(odd, PlanError, "column 'lists' holds lists", examples=[0], edits=[{**edit, "column": "lists"}])
    with residua.replay(model, archive, examples=[1, 0], edits=[edit], keep="resid_post.1") as run:
        wanted = torch.from_numpy(np.asarray(archive["resid_post.1"][:6], np.float64).mean(0)).float()
        for rows in run["resid_post.1"]:
            torch.testing.assert_close(rows, wanted.expand_as(rows), rtol=1e-6, atol=1e-6)


def test_a_class_that_another_archive_does_not_have(llama: Given, tmp_path: Path) -> None:
    other = residua.capture_dataset(
        llama[0], [{"input_ids": [5, 6], "label": "b"}], out=tmp_path / "b", sites="resid_post.1"
    ).archive
    edit = {"edit": "mean", "site": "resid_post.1", "column": "label", "archive": other.path}
    refused(llama, PlanError, "label == 'a' was asked for, and .* has no such example", examples=[0], edits=[edit])


def test_an_example_without_rows_and_edits_that_change_nothing(odd: Given) -> None:
    swap: dict[str, Any] = {"edit": "swap", "site": "resid_post.1", "source": 2}
    said = "edit 1 .* needs a stored row for position 1"
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
    whole = archive["logits"].torch()
    (archive.path / "commits" / "00000001-0000.json").unlink()
    part = residua.open(archive.path)
    with residua.replay(model, part, examples=[0], at="resid_post.1") as run:
        assert f"{archive.path} is not sealed: 29 rows are captured so far" in run.notes
        torch.testing.assert_close(run.logits[0], whole[:12])
    refused((model, part), NotCapturedError, "rows from 16 on are not captured yet", examples=[1], at="resid_post.1")
    swap = {"edit": "swap", "site": "resid_post.1", "source": 1}
    said = r"edit 1 \(swap at resid_post\.1\): rows from 16 on are not captured yet"
    refused((model, part), NotCapturedError, said, examples=[0], edits=[swap])
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
