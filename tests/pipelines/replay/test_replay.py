"""Replay of an archive: tables against plain hooks and sums, and the same tables after kill -9 at many steps."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
import yaml
from torch import Tensor

import residua
from residua.pipelines.cli.main import main
from residua.pipelines.replay.result_folder import EXAMPLES, read_table, table_file, write_table
from residua.store.base.errors import NotCapturedError, PlanError
from residua.store.read.archive import Archive
from residua.store.storage.destination import DiskFolder
from residua.store.storage.files import write_file
from residua.store.storage.lock import ArchiveInUseError, locked
from tests.calls import count_calls
from tests.capture.replay_samples import EVEN, LAST, LENGTHS, PADDED, captured, model_of, run_in_full, tokens
from tests.forking import Forks
from tests.ragged import MODEL, capture_words, write_dataset
from tests.stopped import take_back

HALVE = {"edit": "scale", "site": "mlp_out.2", "by": 0.5, "positions": "2:"}
CHOSEN = (5, 40)
Floats = npt.NDArray[np.float64]


def by_hand(archive: Archive, examples: list[int]) -> dict[int, tuple[Floats, Floats]]:
    """Return the logits of each example with the edit and without, in float64, by a hook on the MLP."""
    model = model_of("llama")

    def halve(_module: object, _inputs: object, output: Tensor) -> Tensor:
        return torch.cat([output[:, :2], output[:, 2:] * 0.5], 1)

    plain, mask = run_in_full(model, archive, examples)
    handle = model.get_submodule("model.layers.2.mlp").register_forward_hook(halve)
    edited, _ = run_in_full(model, archive, examples)
    handle.remove()
    pairs = zip(edited.double(), plain.double(), mask, strict=True)
    return {number: (e[m].numpy(), p[m].numpy()) for number, (e, p, m) in zip(examples, pairs, strict=True)}


def log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


@pytest.mark.parametrize("at", ["resid_post.1", None])
def test_every_number_equals_the_one_of_plain_hooks(at: str | None, tmp_path: Path) -> None:
    archive = captured(model_of("llama"), tmp_path / "a", rows_per_shard=16)
    found = residua.replay_dataset(
        model_of("llama"), archive, out=tmp_path / "out", edits=[HALVE], at=at, tokens=CHOSEN
    )
    logits = {k: v for batch in (EVEN, PADDED, LAST) for k, v in by_hand(archive, batch).items()}
    table = found.tokens.to_pandas()
    assert table["example"].tolist() == np.repeat(np.arange(5), LENGTHS).tolist()
    assert table["row"].tolist() == list(range(sum(LENGTHS)))
    for example, ids in enumerate(tokens()):
        lines, (edited, plain) = table[table["example"] == example], logits[example]
        log_q, log_p = log_softmax(edited), log_softmax(plain)
        at_next = np.arange(len(ids) - 1), ids[1:]
        losses, unedited = -log_q[at_next], -log_p[at_next]
        assert lines["token"].tolist() == ids
        np.testing.assert_allclose(lines["kl"], (np.exp(log_p) * (log_p - log_q)).sum(-1), rtol=1e-4, atol=3e-6)
        np.testing.assert_allclose(lines["loss"], [*losses, np.nan], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(lines["unedited_loss"], [*unedited, np.nan], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(lines["loss_change"], [*(losses - unedited), np.nan], rtol=1e-4, atol=2e-5)
        assert lines["top1_agrees"].tolist() == (edited.argmax(-1) == plain.argmax(-1)).tolist()
        for token in CHOSEN:
            np.testing.assert_allclose(lines[f"logit_{token}"], edited[:, token], rtol=1e-4, atol=1e-4)
            change = (edited - plain)[:, token]
            np.testing.assert_allclose(lines[f"logit_{token}_change"], change, rtol=1e-4, atol=1e-4)
        line = found.examples.slice(example, 1).to_pylist()[0]
        assert line["n_tokens"] == len(ids)
        assert line["loss_change"] == pytest.approx((losses - unedited).mean(), rel=1e-4, abs=1e-5)
        assert line["kl_max"] == pytest.approx(lines["kl"].max())
        assert line["top1_agreement"] == pytest.approx(lines["top1_agrees"].mean())
    assert table["kl"].max() > 1e-3
    record = json.loads((tmp_path / "out/residua.json").read_text())
    assert record["request"]["edits"] == [{**HALVE, "site": ["mlp_out.2"]}]
    assert record["reproducible"] is True


def test_an_edit_that_changes_nothing_changes_no_bit(tmp_path: Path) -> None:
    model = model_of("llama")
    archive = captured(model, tmp_path / "a")
    same = [{"edit": "scale", "site": "resid_post.1", "by": 1.0}]
    calls: list[int] = []
    block = model.get_submodule("model.layers.2.mlp")
    handle = count_calls(block, calls)
    found = residua.replay_dataset(model, archive, out=tmp_path / "out", edits=same, at="resid_post.1")
    handle.remove()
    assert found.tokens["kl"].to_pylist() == [0.0] * sum(LENGTHS)
    assert set(found.tokens["loss_change"].drop_null().to_pylist()) == {0.0}
    assert found.notes == ()
    assert len(calls) == 3, "the run without edits starts where the last rows are stored"


def test_examples_are_chosen_by_number_and_condition(tmp_path: Path) -> None:
    model = model_of("llama")
    archive = captured(model, tmp_path / "a")
    options: dict[str, Any] = {"edits": [HALVE], "at": "resid_post.1"}
    found = residua.replay_dataset(model, archive, out=tmp_path / "b", where='label == "b"', **options)
    assert found.examples["example"].to_pylist() == [1, 3]
    assert any("ran in another batch" in note for note in found.notes)
    whole = residua.replay_dataset(model, archive, out=tmp_path / "all", **options).examples["kl"].to_numpy()
    np.testing.assert_allclose(found.examples["kl"], whole[[1, 3]], rtol=1e-3)
    with pytest.raises(PlanError, match=r"another request:\n  examples: .*null.*\[1\]"):
        residua.replay_dataset(model, archive, out=tmp_path / "all", examples=[1], **options)
    with pytest.raises(PlanError, match=r"examples \[9\].* 5\b"):
        residua.replay_dataset(model, archive, out=tmp_path / "c", examples=[9], **options)
    with pytest.raises(PlanError, match="no example"):
        residua.replay_dataset(model, archive, out=tmp_path / "c", where='label == "z"?', **options)
    by_row: dict[str, Any] = {"out": tmp_path / "r", "rows": [24, 12, 41], "examples": [1, 2, 3], **options}
    assert residua.replay_dataset(model, archive, **by_row).examples["example"].to_pylist() == [1, 2, 3]
    assert residua.replay_dataset(model, archive, **{**by_row, "rows": [41, 24, 12], "examples": [3, 2, 1]}).resumed
    assert residua.replay_dataset(model, archive, out=tmp_path / "s", rows=range(12), **options).n_examples == 1
    with pytest.raises(PlanError, match=r'rows: .*"0-11".*"0-3,7"'):
        residua.replay_dataset(model, archive, out=tmp_path / "s", rows=[0, 1, 2, 3, 7], **options)
    with pytest.raises(PlanError, match=r"rows \[45\].* 45\b"):
        residua.replay_dataset(model, archive, out=tmp_path / "c", rows=[3, 45], **options)
    with pytest.raises(PlanError, match=r"tokens \[97\].* 97\b"):
        residua.replay_dataset(model, archive, out=tmp_path / "c", tokens=[97], **options)
    with pytest.raises(PlanError, match=r"not empty.*residua\.json"):
        residua.replay_dataset(model, archive, out=tmp_path, **options)
    assert not (tmp_path / "c").exists()


def test_the_captured_examples_of_an_unsealed_archive_are_replayed(tmp_path: Path) -> None:
    model = model_of("llama")
    archive = captured(model, tmp_path / "a", rows_per_shard=16)
    options: dict[str, Any] = {"edits": [HALVE], "at": "resid_post.1"}
    expected = residua.replay_dataset(model, archive, out=tmp_path / "sealed", **options).tokens
    take_back(archive.path)
    (record,) = (archive.path / "commits").glob("00000002-*")
    record.rename(tmp_path / "kept")  # the last rows of example 3, and example 4
    found = residua.replay_dataset(model, archive.path, out=tmp_path / "unsealed", **options)
    assert found.examples["example"].to_pylist() == [0, 1]  # the group of the others is not complete
    assert any("is not sealed" in note for note in found.notes)
    (tmp_path / "kept").rename(record)
    again = residua.replay_dataset(model, archive.path, out=tmp_path / "unsealed", **options)
    assert again.resumed
    assert again.tokens["example"].to_pylist() == expected["example"].to_pylist()
    for path in (archive.path / "commits").glob("*"):
        path.unlink()
    with pytest.raises(NotCapturedError, match="run the capture first"):
        residua.replay_dataset(model, archive.path, out=tmp_path / "none", **options)


def test_one_table_never_mixes_two_models(tmp_path: Path) -> None:
    model, other = model_of("llama"), model_of("llama")
    archive = captured(model, tmp_path / "a")
    options: dict[str, Any] = {"out": tmp_path / "out", "edits": [HALVE], "at": "resid_post.1", "force": True}
    residua.replay_dataset(model, archive, **options)
    with torch.no_grad():
        other.get_parameter("model.layers.2.mlp.down_proj.weight").mul_(2)
    with pytest.raises(PlanError, match=r"another request:\n  model\.weights"):
        residua.replay_dataset(other, archive, **options)


def test_killed_at_many_steps_it_ends_the_same(forks: Forks, tmp_path: Path) -> None:
    archive = tmp_path / "acts.zarr"
    dataset = write_dataset(tmp_path / "ragged.jsonl", 10)
    assert forks.run(capture_words(dataset, archive, "--sites", "resid_post.3,resid_post.5")).code == 0
    write_file(tmp_path / "edits.yaml", [yaml.safe_dump([{"edit": "zero", "site": "attn_out.4"}]).encode()])
    job = ["replay", str(archive), "--model", str(MODEL), "--edit", str(tmp_path / "edits.yaml")]
    words = [*job, "--at", "resid_post.3", "--tokens", "7,9", "--out"]
    ended = forks.run([*words, tmp_path / "reference"])
    assert ended.code == 0, ended.output
    assert "nats a token" in ended.output
    n_files = len(list((tmp_path / "reference/examples").iterdir()))
    assert n_files > 4
    n_left: list[int] = []
    for die_at in (2, 20, 26, 24, 22):
        assert forks.run([*words, tmp_path / "killed"], die_at=die_at).code == -signal.SIGKILL
        n_left.append(len(list((tmp_path / "killed/examples").glob("part-*"))) if die_at > 2 else 0)
    assert n_left == sorted(n_left)
    assert 0 < n_left[-1] < n_files
    assert forks.run([*words, tmp_path / "killed"]).code == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "reference")


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file except those that hold the command line."""
    without = (folder / "residua.json", folder / "acts.zarr/zarr.json")
    files = [path for path in folder.rglob("*") if path.is_file() and path not in without]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_command_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = captured(model_of("llama"), tmp_path / "a")
    words = ["replay", str(archive.path), "--model", str(MODEL), "--edit", str(tmp_path / "no.yaml"), "--out", "x"]
    assert main(words) == 2
    assert str(tmp_path / "no.yaml") in capsys.readouterr().err
    assert main([*words, "--examples", "3-x"]) == 2
    assert "3-x" in capsys.readouterr().err


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    archive = captured(model_of("llama"), tmp_path / "a")
    with locked(tmp_path / "out"), pytest.raises(ArchiveInUseError, match=re.escape(str(tmp_path / "out"))):
        residua.replay_dataset(model_of("llama"), archive, out=tmp_path / "out", edits=[HALVE])


def test_files_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for group in (100_000, 7, 99_999):
        write_table(DiskFolder(tmp_path), table_file(EXAMPLES, group), pa.table({"example": [group]}))
    assert read_table(DiskFolder(tmp_path), EXAMPLES)["example"].to_pylist() == [7, 99_999, 100_000]


def test_a_run_is_not_resumed_with_an_overlay_that_changed(tmp_path: Path) -> None:
    archive = captured(model_of("llama"), tmp_path / "a", sites="resid_post.*")
    overlay = residua.overlay(archive, tmp_path / "o")
    ask: Any = {
        "out": tmp_path / "out",
        "edits": [{"edit": "overlay", "site": "resid_post.1", "overlay": tmp_path / "o"}],
    }
    residua.replay_dataset(model_of("llama"), archive, **ask)
    assert residua.replay_dataset(model_of("llama"), archive, **ask).resumed
    overlay.write("resid_post.1", [0], archive["resid_post.1"].numpy([1], dtype=np.float32))
    with pytest.raises(PlanError, match="contents"):
        residua.replay_dataset(model_of("llama"), archive, **ask)
