"""Files of a replay: planned as the run goes, with what their edits reach; every run has the notes of a single one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedModel

import residua
from residua.capture.forward.plan_batch import PlanBatch
from residua.capture.replay.engine import Replayer
from residua.pipelines.replay.result_folder import EXAMPLES
from residua.store.examples.schedule import Batch, Schedule
from residua.store.read.archive import Archive
from tests.capture.replay_samples import captured, model_of

N_FILES = 3
LAST_ROW = 44  # of the last example, in the last file
EDITS: list[dict[str, Any]] = [
    {"edit": "scale", "site": "mlp_out.2", "by": 0.5, "rows": [LAST_ROW]},
    {"edit": "scale", "site": "mlp_out.2", "by": 0.5, "examples": [4], "positions": [0]},
    {"edit": "zero", "site": "mlp_out.2", "tokens": [96], "examples": [0]},
    {"edit": "zero", "site": "mlp_out.2", "where": {"label": "none"}, "allow_empty": True},
]
IDLE = [3, 4]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return model_of("llama")


@pytest.fixture(scope="module")
def archive(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return captured(model, tmp_path_factory.mktemp("a") / "a", rows_per_shard=16)


def idle(notes: object) -> list[int]:
    assert isinstance(notes, list | tuple)
    return [int(note.split()[1]) for note in notes if "changes nothing" in note]


def parts(out: Path) -> list[Path]:
    return sorted((out / EXAMPLES).glob("part-*.parquet"))


def test_the_model_runs_before_later_batches_are_planned(
    model: PreTrainedModel, archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[int] = []
    made: list[object] = []
    ran_after: list[int] = []
    batches, make = Schedule.batches, Replayer.batch

    def planning(schedule: Schedule, shard: int) -> list[Batch]:
        planned.append(shard)
        return batches(schedule, shard)

    def making(replayer: Replayer, examples: Sequence[int]) -> PlanBatch:
        made.append(examples)
        return make(replayer, examples)

    monkeypatch.setattr(Schedule, "batches", planning)
    monkeypatch.setattr(Replayer, "batch", making)
    handle = model.register_forward_pre_hook(lambda *_: ran_after.append(max(planned)))
    residua.replay_dataset(model, archive, out=tmp_path / "out", edits=EDITS, at="resid_post.1")
    handle.remove()
    assert ran_after[0] == 0, "the batches of the first file are known when the first one runs, and no others"
    assert ran_after[-1] == N_FILES - 1
    assert len(made) <= 1 + len(archive.example_table), "each is made once, and the first once more to check it"


@pytest.mark.parametrize("chosen", [None, [0, 1, 2, 3], [4], [0]])
def test_edits_that_reach_no_token_of_any_file_are_named(
    model: PreTrainedModel, archive: Archive, tmp_path: Path, chosen: list[int] | None
) -> None:
    out = tmp_path / "out"
    found = residua.replay_dataset(
        model, archive, out=out, edits=EDITS, at="resid_post.1", examples=chosen, capture="resid_post.2"
    )
    wanted = IDLE if chosen is None or 4 in chosen else [1, 2, *IDLE]
    assert idle(found.notes) == wanted
    assert json.loads((out / "residua.json").read_text())["notes"] == list(found.notes)
    assert found.archive is not None
    replay: Any = found.archive.provenance["replay"]
    assert idle(replay["notes"]) == wanted


def test_a_run_that_goes_on_says_what_one_run_says(model: PreTrainedModel, archive: Archive, tmp_path: Path) -> None:
    options: dict[str, Any] = {"edits": EDITS, "at": "resid_post.1", "examples": [0, 2, 4]}
    whole = residua.replay_dataset(model, archive, out=tmp_path / "whole", **options)
    assert any("another batch" in note for note in whole.notes)
    record = (tmp_path / "whole/residua.json").read_bytes()
    for lost in range(len(parts(tmp_path / "whole"))):
        parts(tmp_path / "whole")[lost].unlink()
        again = residua.replay_dataset(model, archive, out=tmp_path / "whole", **options)
        assert (again.resumed, again.notes) == (True, whole.notes)
        assert (tmp_path / "whole/residua.json").read_bytes() == record
        assert again.examples.equals(whole.examples)


def test_of_files_that_do_not_say_what_edits_reached_nothing_is_said(
    model: PreTrainedModel, archive: Archive, tmp_path: Path
) -> None:
    """As version 0.1 wrote them."""
    options: dict[str, Any] = {"edits": EDITS, "at": "resid_post.1", "out": tmp_path / "out"}
    residua.replay_dataset(model, archive, **options)
    first, *others = parts(tmp_path / "out")
    pq.write_table(pq.read_table(first).replace_schema_metadata(None), first)
    for path in others[1:]:
        path.unlink()
    again = residua.replay_dataset(model, archive, **options)
    assert again.resumed
    assert idle(again.notes) == []
    assert again.examples["example"].to_pylist() == list(range(5))
