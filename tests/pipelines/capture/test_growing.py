"""Captures that begin before their dataset is read to the end: the same rows, whenever what was read, and by whom."""

import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import residua
from residua.capture.recording.stats import RecordStats
from residua.pipelines.capture import dataset_job, growing
from residua.pipelines.capture.add_sites import add_sites
from residua.pipelines.capture.result import CaptureResult
from residua.pipelines.data.reading import SETTLED_SECONDS
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.pipelines.setup.models import load_model, load_tokenizer
from residua.store.base.errors import DatasetError, PlanError
from residua.store.read.archive import Archive
from residua.store.verification.verify import verify
from tests.forking import Forks
from tests.models.tiny import TINY, VOCABULARY
from tests.models.tiny_pairs import TINY_PAIRS
from tests.pipelines.capture.growing_samples import PART_BYTES, capture, make_rows, write_long_labels
from tests.ragged import MODEL, capture_words
from tests.stopped import check_end, check_stop, content

WORDS = ("the", "list", "of", "a", "function", "returns", "its", "value", "if", "none", "else", "raise", "error")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "FIRST_PART_BYTES", PART_BYTES)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return TINY["llama"]()


@pytest.fixture(scope="module")
def reference(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture that reads everything before the model runs: nothing can be in another order."""
    out = tmp_path_factory.mktemp("reference") / "a.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(growing, "FIRST_PART_BYTES", PART_BYTES)
        patch.setattr(growing.ExamplesAhead, "go_on", _reading_all(growing.ExamplesAhead.go_on))
        capture(model, make_rows(), out)
    return out


def _reading_all(go_on: Any) -> Any:
    def and_wait(ahead: growing.ExamplesAhead, *args: Any, **more: Any) -> None:
        go_on(ahead, *args, **more)
        ahead.finish()

    return and_wait


def stored(path: Path) -> dict[str, Any]:
    """Return what an archive holds, but for the digest of its plan, and for how its examples are cut into files."""
    archive = Archive(path)
    files = {name: digest for name, digest in content(path).items() if "/c/" in name}
    records = [json.loads(file.read_text())["record"] for file in sorted(path.glob("commits/*.json"))]
    table = archive.examples.to_pylist()
    return {
        "files": files,
        "records": [{**record, "plan": ""} for record in records],
        "examples": table,
        "sealed": archive.metadata.sealed,
    }


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 64},
        {"max_length": 7, "positions": "every:3", "codec": "int8-block32"},
        {"max_length": 20, "positions": "last", "dtype": "bfloat16", "long_examples": "truncate"},
        {"positions": "column:mask", "max_tokens": 777, "min_length": 2},
    ],
)
def test_growing_is_an_order_of_work(model: PreTrainedModel, tmp_path: Path, options: dict[str, Any]) -> None:
    whole = capture(model, make_rows(), tmp_path / "whole.zarr", **options, grow=False)
    grown = capture(model, make_rows(), tmp_path / "grown.zarr", **options)
    assert stored(tmp_path / "grown.zarr") == stored(tmp_path / "whole.zarr")
    assert grown.dataset == whole.dataset
    assert len(list((tmp_path / "grown.zarr" / "examples").iterdir())) > 2
    assert grown.archive.plan.n_rows is None
    assert verify(tmp_path / "grown.zarr").problems == []
    assert [note for note in whole.notes if "rows_per_shard" not in note] == [
        note for note in grown.notes if "rows_per_shard" not in note
    ]


@pytest.mark.parametrize("positions", ["last", "column:mask"])
def test_the_model_begins_although_few_positions_are_kept(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, positions: str
) -> None:
    monkeypatch.setattr(growing, "SHARD_TOKENS", 2000)
    rows = [{"input_ids": [3 + i % 9] * 20, "mask": [at == 7 for at in range(20)]} for i in range(1200)]
    began = threading.Event()

    def waiting() -> Iterator[dict[str, Any]]:
        yield from rows[:700]
        assert began.wait(60), "no batch ran before all was read"
        yield from rows[700:]

    def on_batch(stats: RecordStats) -> None:
        if stats.rows:
            began.set()

    options: Any = {"positions": positions, "max_length": 32, "rows_per_shard": None}
    grown = capture(model, waiting(), tmp_path / "grown.zarr", **options, on_batch=on_batch)
    whole = capture(model, rows, tmp_path / "whole.zarr", **options, grow=False)
    assert grown.archive.plan.rows_per_shard < whole.archive.plan.rows_per_shard
    assert np.array_equal(grown.archive["resid_post.1"][:], whole.archive["resid_post.1"][:])
    assert not grown.notes


def test_texts_of_a_file_grow_and_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = CaptureSettings(device="cpu")
    model, tokenizer = load_model(str(MODEL), chosen), load_tokenizer(str(MODEL), chosen)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    rng = np.random.default_rng(8)
    texts = [" ".join(rng.choice(WORDS, size).tolist()) for size in rng.integers(0, 30, 400)]
    dataset = tmp_path / "texts.jsonl"
    dataset.write_text("".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts)))
    time.sleep(SETTLED_SECONDS + 0.1)
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_length": 24, "drop_special": True}
    capture(model, str(dataset), tmp_path / "whole.zarr", **options, grow=False)
    grown = capture(model, str(dataset), tmp_path / "grown.zarr", **options)
    assert stored(tmp_path / "grown.zarr") == stored(tmp_path / "whole.zarr")
    assert grown.dataset.n_empty > 0
    notes: Any = grown.archive.provenance["notes"]
    assert any("no tokens" in note for note in notes)
    monkeypatch.setattr(dataset_job, "read_examples", None)
    again = capture(model, str(dataset), tmp_path / "grown.zarr", **options)
    assert (again.resumed, again.stats.rows, again.dataset) == (True, 0, grown.dataset)


def test_the_model_runs_before_the_dataset_is_read_to_its_end(
    model: PreTrainedModel, reference: Path, tmp_path: Path
) -> None:
    ran, read = threading.Event(), []

    def rows() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(make_rows()):
            if number == 450:
                assert ran.wait(300), "the model waits for the end of the dataset"
            read.append(number)
            yield row

    def after(stats: RecordStats) -> None:
        if stats.committed_rows:
            seen.append(len(read))
            ran.set()

    seen: list[int] = []
    found = capture(model, rows(), tmp_path / "a.zarr", on_batch=after)
    assert seen[0] <= 450 < len(make_rows())
    assert found.archive.plan.digest == Archive(reference).plan.digest
    check_end(tmp_path / "a.zarr", reference)


class _StopError(Exception):
    """What ends captures in these tests."""


def _stopping(after: int) -> Any:
    n = 0

    def count(stats: RecordStats) -> None:
        nonlocal n
        n += stats.committed_rows > 0
        if n >= after:
            raise _StopError

    return count


@pytest.mark.parametrize("stops", [(1, 4), (9,), (2, 2, 2)])
def test_a_capture_that_stopped_goes_on(
    model: PreTrainedModel, reference: Path, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    out, files = tmp_path / "a.zarr", dict[str, tuple[str, int]]()
    for after in stops:
        with pytest.raises(_StopError):
            capture(model, make_rows(), out, on_batch=_stopping(after))
        files = check_stop(out, files)
        assert files
        opened = residua.open(out)
        assert not opened.is_sealed
        assert opened.n_rows <= opened.progress.rows
    assert capture(model, make_rows(), out).resumed
    check_end(out, reference)


def test_a_row_that_cannot_be_used_comes_late(model: PreTrainedModel, reference: Path, tmp_path: Path) -> None:
    out, safe = tmp_path / "a.zarr", threading.Event()

    def rows(bad: object) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(make_rows()):
            if number == 470:
                assert safe.wait(300)
                yield {**row, "input_ids": bad}
            yield row

    def after(stats: RecordStats) -> None:
        if stats.committed_rows:
            safe.set()

    with pytest.raises(DatasetError, match="row 470"):
        capture(model, rows([VOCABULARY]), out, on_batch=after)
    files = check_stop(out, {})
    assert files
    with pytest.raises(DatasetError, match="row 470"):
        capture(model, rows("words"), out, on_batch=after)
    files = check_stop(out, files)
    assert len(list((out / "examples").iterdir())) < len(list((reference / "examples").iterdir()))
    again = capture(model, make_rows(), out)
    assert again.stats.committed_rows < again.archive.n_rows
    assert check_stop(out, files)
    check_end(out, reference)


def test_rows_that_cannot_be_used_at_the_start_leave_nothing(model: PreTrainedModel, tmp_path: Path) -> None:
    for rows, words in (([[VOCABULARY]], "row 0"), ([], "empty"), ([[]], "no example"), (["text"], "tokenizer")):
        with pytest.raises(DatasetError, match=words):
            capture(model, rows, tmp_path / "a.zarr")
    assert not list(tmp_path.iterdir())


def test_another_dataset_is_refused(model: PreTrainedModel, reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, out := tmp_path / "a.zarr")
    before, rows = content(out), make_rows()
    with pytest.raises(PlanError, match=r"dataset\.begins"):
        capture(model, [{**rows[0], "input_ids": [3]}, *rows[1:]], out)
    with pytest.raises(DatasetError, match=r"a\.zarr was begun with another dataset"):
        capture(model, [*rows[:-1], {**rows[-1], "input_ids": [3] * 9}], out)
    for other in (rows[:-1], [*rows, rows[0]]):
        with pytest.raises(DatasetError, match="another dataset"):
            capture(model, other, out)
    with pytest.raises(PlanError, match=r"rules\.grow"):
        capture(model, rows, out, grow=False)
    assert content(out) == before


def test_two_workers_share_what_grows(model: PreTrainedModel, reference: Path, tmp_path: Path) -> None:
    out, joined = tmp_path / "a.zarr", threading.Event()
    found: list[CaptureResult] = []

    def ran(stats: RecordStats) -> None:
        if stats.rows:
            joined.set()

    def rows() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(make_rows()):
            if number == 450:
                assert joined.wait(300)
            yield row

    def later(*_: object) -> None:
        other.start()

    def join() -> None:
        own = TINY["llama"]()
        found.append(capture(own, None, out, join=True, on_batch=ran))

    other = threading.Thread(target=join)
    first = capture(model, rows(), out, join=True, on_plan=later, on_batch=lambda _: joined.wait(300))
    other.join()
    assert [worker.worker for worker in first.workers] == [0, 1]
    assert all(worker.stats.committed_rows for worker in first.workers)
    assert found[0].dataset == first.dataset
    check_end(out, reference)


def test_killed_captures_go_on(forks: Forks, tmp_path: Path) -> None:
    dataset = write_long_labels(tmp_path / "rows.jsonl")

    def words(name: str) -> list[str]:
        (tmp_path / name).mkdir(exist_ok=True)
        return capture_words(dataset, tmp_path / name / "a.zarr", "--grow", "--sites", "resid_post.3")

    ended = forks.run(words("reference"))
    assert ended.code == 0, ended.output
    n_parts = len(list((tmp_path / "reference" / "a.zarr" / "examples").iterdir()))
    assert n_parts > 2
    out, files = tmp_path / "killed" / "a.zarr", dict[str, tuple[str, int]]()
    for die_at in (20, 45, 47, 60, 100):
        assert forks.run(words("killed"), die_at=die_at).code == -signal.SIGKILL
        files = check_stop(out, files)
    ended = forks.run([*words("killed"), "--join"])
    assert ended.code == 0, ended.output
    check_end(out, tmp_path / "reference" / "a.zarr")


def test_what_cannot_grow_is_refused_before_anything_runs(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[dict[str, Any]] = [{"generate": 4}, {"image_column": "image"}, {"tp": 2}, {"pp": 2}]
    for options in kinds:
        with pytest.raises(PlanError, match="grow"):
            CaptureSettings(grow=True, **options)
    monkeypatch.setattr(growing, "token_limit", lambda _: None)  # as that of a model without position embeddings
    with pytest.raises(PlanError, match="max_length"):
        capture(llama, make_rows(), tmp_path / "a.zarr")
    with pytest.raises(PlanError, match=r"grow.* two"):
        capture(TINY_PAIRS["t5"](), [{"source": "a", "target": "b"}], tmp_path / "a.zarr")
    assert not list(tmp_path.iterdir())


def test_a_grown_archive_is_used_as_others_are(model: PreTrainedModel, reference: Path, tmp_path: Path) -> None:
    archive = residua.open(reference)
    assert archive.was_finished
    assert archive.batch_of(0)
    assert residua.reproduce(model, reference, n_batches=3).is_exact
    with residua.replay(model, reference, examples=archive.batch_of(0), at="resid_post.1") as run:
        assert not any("loop" in note for note in run.notes)


def test_sites_are_added_over_the_examples_that_are_known(
    model: PreTrainedModel, reference: Path, tmp_path: Path
) -> None:
    shutil.copytree(reference, out := tmp_path / "a.zarr")
    at_once = capture(model, make_rows(), tmp_path / "all.zarr", sites="resid_post.0,resid_post.1").archive
    settings, ran, all_ran = CaptureSettings(sites="resid_post.0"), list[int](), threading.Event()

    def rows(n: int) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(make_rows()[:n]):
            if number == 450:
                assert all_ran.wait(200), "the model waits for rows, although their examples are known"
            yield row

    def after(stats: RecordStats) -> None:
        ran.append(stats.rows)
        if stats.rows >= at_once.n_rows:
            all_ran.set()

    before = content(out)
    with pytest.raises(DatasetError, match="another dataset"):
        add_sites(model, rows(499), out=out, settings=settings, on_batch=after)
    with pytest.raises(PlanError, match=r"dataset\.begins"):
        add_sites(model, make_rows(seed=4), out=out, settings=settings)
    assert content(out) == before
    found = add_sites(model, rows(500), out=out, settings=settings, on_batch=after)
    assert found.resumed
    assert found.dataset.n_examples == 500
    for site in at_once.sites:
        assert np.array_equal(found.archive[site].bits(), at_once[site].bits())
    assert found.archive.metadata.sealed == at_once.metadata.sealed
    assert found.archive.examples == at_once.examples
    report = verify(out)
    assert (report.problems, report.notes) == ([], [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zarr", "all.zarr"]


def test_sites_are_added_without_reading_what_did_not_change(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = tmp_path / "rows.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    time.sleep(SETTLED_SECONDS + 0.1)
    first = capture(model, str(dataset), tmp_path / "a.zarr")
    monkeypatch.setattr(dataset_job, "read_examples", None)
    settings = CaptureSettings(sites="resid_post.0")
    found = add_sites(model, str(dataset), out=tmp_path / "a.zarr", settings=settings)
    assert found.dataset == first.dataset
    assert set(found.archive.sites) == {"resid_post.0", "resid_post.1"}
    assert verify(tmp_path / "a.zarr").problems == []
