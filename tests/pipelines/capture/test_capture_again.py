"""The same capture again, and what is refused: another plan, a folder of the user's, bad requests."""

import json
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import residua
from residua.pipelines.capture import dataset_job
from residua.pipelines.capture.capture import capture_dataset
from residua.pipelines.cli.main import main
from residua.pipelines.data.reading import SETTLED_SECONDS
from residua.store.base.errors import DatasetError, PlanError, UnknownSiteError
from tests.models.tiny import TINY
from tests.pipelines.small_capture import capture
from tests.stopped import content


def test_a_second_run_finds_nothing_to_do(llama: PreTrainedModel, tokens: list[list[int]], tmp_path: Path) -> None:
    capture(llama, tokens, tmp_path / "a.zarr", sites="resid_post.*")
    again = capture(llama, tokens, tmp_path / "a.zarr", sites="resid_post.*")
    assert again.resumed
    assert again.stats.rows == 0


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"sites": "resid_post.1"}, "sites.resid_post.0"),
        ({"codec": "raw"}, "codec"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"positions": "last"}, "rules.positions"),
        ({"batch_tokens": 64}, "batch_tokens"),
        ({"rows_per_shard": 32}, "rows_per_shard"),
        ({"attn": "eager"}, "model.attention"),
    ],
)
def test_another_plan_is_refused_and_the_field_named(
    changed: dict[str, Any], named: str, tokens: list[list[int]], tmp_path: Path
) -> None:
    model = TINY["llama"]()
    capture(model, tokens, tmp_path / "a.zarr", sites="resid_post.*")
    if "attn" in changed:
        model.set_attn_implementation(changed["attn"])
        changed = {}
    with pytest.raises(PlanError, match=named):
        capture(model, tokens, tmp_path / "a.zarr", **{"sites": "resid_post.*", **changed})


def test_other_weights_and_other_data_are_refused(tokens: list[list[int]], tmp_path: Path) -> None:
    model = TINY["llama"]()
    capture(model, tokens, tmp_path / "a.zarr", sites="resid_post.0")
    with pytest.raises(PlanError, match=r"dataset\.digest"):
        capture(model, [*tokens[:-1], [3, 3, 3, 3]], tmp_path / "a.zarr", sites="resid_post.0")
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    with pytest.raises(PlanError, match=r"model\.weights"):
        capture(model, tokens, tmp_path / "a.zarr", sites="resid_post.0")


def test_resuming_notes_conditions_that_changed(
    llama: PreTrainedModel, tokens: list[list[int]], tmp_path: Path
) -> None:
    capture(llama, tokens, tmp_path / "a.zarr", sites="embed")
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        again = capture(llama, tokens, tmp_path / "a.zarr", sites="embed")
    finally:
        torch.set_num_threads(before)
    assert f"threads: {before} when it was captured, {before + 1} now" in again.notes


def test_a_shard_that_was_deleted_is_captured_again(
    llama: PreTrainedModel, tokens: list[list[int]], tmp_path: Path
) -> None:
    capture(llama, tokens, tmp_path / "a.zarr", sites="resid_post.*")
    shard = tmp_path / "a.zarr" / "sites" / "resid_post" / "1" / "c" / "2" / "0"
    before = shard.read_bytes()
    shard.unlink()
    again = capture(llama, tokens, tmp_path / "a.zarr", sites="resid_post.*")
    assert any("shard 2 will be captured again" in note for note in again.notes)
    assert shard.read_bytes() == before
    assert residua.verify(tmp_path / "a.zarr").is_sound


def test_a_folder_of_the_user_is_never_overwritten(
    llama: PreTrainedModel, tokens: list[list[int]], tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="exists and is not"):
        capture(llama, tokens, tmp_path, sites="embed")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_bad_requests_quote_the_users_words(llama: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(UnknownSiteError, match=r"resid_pots\.1"):
        capture(llama, [[5]], tmp_path / "a.zarr", sites="resid_pots.1")
    with pytest.raises(DatasetError, match="empty"):
        capture(llama, [], tmp_path / "a.zarr")
    with pytest.raises(DatasetError, match=r"70|64"):
        capture(llama, [[5] * 70], tmp_path / "a.zarr")
    with pytest.raises(PlanError, match="not a setting"):
        capture(llama, [[5]], tmp_path / "a.zarr", site="embed")
    assert list(tmp_path.iterdir()) == []


def test_drop_special_without_a_tokenizer_is_refused(
    llama: PreTrainedModel, tokens: list[list[int]], tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match="drop_special=True needs a tokenizer"):
        capture(llama, tokens, tmp_path / "a.zarr", drop_special=True)


def test_the_memory_bound_holds_for_tall_shards(
    llama: PreTrainedModel, tokens: list[list[int]], tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=r"host_memory=.* 1,000 bytes"):
        capture(llama, tokens, tmp_path / "a.zarr", sites="resid_post.*", rows_per_shard=1024, host_memory=1000)


def test_a_broken_tokenizer_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree("models/pydoc-1m", folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(PlanError, match="tokenizer of model='"):
        capture_dataset(str(folder), [[1, 2, 3]], out=tmp_path / "a.zarr", sites="embed")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    result = capture_dataset(folder, [[1, 2, 3]], out=tmp_path / "a.zarr", sites="embed")
    assert result.archive.tokenizer is None


def test_what_the_numbers_depend_on_stays_with_the_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = capture(TINY["llama"](), [[5, 6, 7], [], [8, 9]], tmp_path / "a.zarr", sites="pattern.0")
    archive = residua.open(tmp_path / "a.zarr")
    assert archive.provenance["notes"] == list(result.notes)
    assert main(["info", str(tmp_path / "a.zarr")]) == 0
    said = capsys.readouterr().out
    assert any("eager" in note for note in result.notes)
    assert all(f"note: {note}" in said for note in result.notes)


class _FailingError(Exception):
    """What a model raises in these tests."""


def _failing_from(model: PreTrainedModel, call: int) -> Any:
    """Let the calls of the model that have more than a few tokens fail, from number `call` on."""
    n_calls = 0

    def count(_module: object, _args: object, kwargs: dict[str, Any]) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls >= call:
            raise _FailingError

    return model.register_forward_pre_hook(count, with_kwargs=True)


def test_a_start_that_fails_leaves_nothing_behind(
    llama: PreTrainedModel, tokens: list[list[int]], tmp_path: Path
) -> None:
    out = tmp_path / "a.zarr"

    def start(*_: object) -> None:
        handles.append(_failing_from(llama, 1))

    handles: list[Any] = []
    with pytest.raises(_FailingError):
        capture(llama, tokens, out, sites="embed", on_plan=start)
    handles.pop().remove()
    assert not list(tmp_path.iterdir())
    made = capture(llama, tokens, out, sites="resid_post.*")  # other settings
    assert not made.resumed

    shutil.rmtree(out)

    def later(*_: object) -> None:
        handles.append(_failing_from(llama, 5))

    with pytest.raises(_FailingError):
        capture(llama, tokens, out, sites="resid_post.*", on_plan=later)
    handles.pop().remove()
    rows = residua.open(out).progress.rows
    assert 0 < rows < sum(map(len, tokens))
    with pytest.raises(_FailingError):  # nothing new is safe, and what was there stays
        capture(llama, tokens, out, sites="resid_post.*", on_plan=start)
    handles.pop().remove()
    assert residua.open(out).progress.rows == rows
    again = capture(llama, tokens, out, sites="resid_post.*")
    assert again.resumed
    assert again.archive.is_sealed


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_dataset_that_did_not_change_is_not_read_again(
    llama: PreTrainedModel, tokens: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stopped: bool
) -> None:
    """Neither by a finished capture nor by one that was stopped; and if it changed, it is."""
    path, options = tmp_path / "data.jsonl", {"sites": "resid_post.*", "max_tokens": 150}
    path.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in tokens))
    time.sleep(SETTLED_SECONDS + 0.1)
    expected = capture(llama, path, tmp_path / "expected.zarr", **options)

    def stop(stats: Any) -> None:
        if is_stopped and stats.committed_rows:
            raise StoppedError

    with pytest.raises(StoppedError) if is_stopped else nullcontext():
        capture(llama, path, tmp_path / "a.zarr", on_batch=stop, **options)
    monkeypatch.setattr(dataset_job, "read_examples", lambda *_, **__: pytest.fail("the dataset is read"))
    again = capture(llama, path, tmp_path / "a.zarr", **options)
    assert again.resumed
    assert again.dataset == expected.dataset
    assert again.dataset.n_cut_tokens
    assert content(tmp_path / "a.zarr") == content(tmp_path / "expected.zarr")
    monkeypatch.undo()
    path.write_text(path.read_text().replace(f"[{tokens[0][0]},", f"[{tokens[0][0] + 1},"))
    with pytest.raises(PlanError, match=r"dataset\.digest"):
        capture(llama, path, tmp_path / "a.zarr", **options)
