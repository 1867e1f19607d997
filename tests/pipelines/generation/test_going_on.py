"""Generation that was stopped goes on, on a disk and in a bucket, and the archive is the one of a single run."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

import residua
from residua.store.base.errors import PlanError
from residua.store.read.archive import Archive
from residua.store.storage.objects import ObjectFolder
from tests.forking import Forks
from tests.models.tiny import TINY, VOCABULARY
from tests.ragged import MODEL
from tests.servers.s3 import S3Server
from tests.stopped import check_end, content

pytestmark = pytest.mark.timeout(300)

SETTINGS: dict[str, Any] = {"sites": "resid_post.1,q.0", "generate": 5, "temperature": 1.5, "batch_tokens": 32}


class StoppedError(Exception):
    """Raised in the middle of a generation."""


def stop_after(n: int) -> Any:
    def on_generated(n_done: int, _n_all: int) -> None:
        if n_done >= n:
            raise StoppedError

    return on_generated


def make_prompts() -> list[list[int]]:
    rng = np.random.default_rng(8)
    return [rng.integers(3, VOCABULARY, length).tolist() for length in (4, 2, 11, 6, 6, 1, 9, 3)]


def capture(model: PreTrainedModel, out: Path | str, **options: Any) -> Any:
    return residua.capture_dataset(model, make_prompts(), out=out, **{**SETTINGS, **options})


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "a.zarr"
    capture(TINY["llama"](), out)
    return out


def spool_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.generated")


def test_a_stopped_generation_goes_on(reference: Path, tmp_path: Path) -> None:
    model, out = TINY["llama"](), tmp_path / "a.zarr"
    with pytest.raises(StoppedError):
        capture(model, out, on_generated=stop_after(2))
    kept = {path.name: path.stat().st_mtime_ns for path in (spool_of(out) / "continuations").iterdir()}
    assert len(kept) == 2
    with pytest.raises(StoppedError):
        capture(model, out, on_generated=stop_after(3))
    now = {path.name: path.stat().st_mtime_ns for path in (spool_of(out) / "continuations").iterdir()}
    assert now.items() > kept.items()
    capture(model, out)
    check_end(out, reference)
    again = capture(model, out)
    assert (again.resumed, again.stats.rows, again.dataset.n_rows) == (True, 0, Archive(reference).n_rows)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]
    for other in ({"temperature": 1.0}, {"seed": 1}, {"generate": 6}):
        with pytest.raises(PlanError, match="another plan"):
            capture(model, out, **other)
    with pytest.raises(PlanError, match="prompts"):
        residua.capture_dataset(model, make_prompts()[1:], out=out, **SETTINGS)


def test_another_generation_does_not_go_on_there(tmp_path: Path) -> None:
    model, out = TINY["llama"](), tmp_path / "a.zarr"
    with pytest.raises(StoppedError):
        capture(model, out, on_generated=stop_after(1))
    for other in ({"temperature": 1.0}, {"seed": 1}, {"generate": 6}, {"batch_tokens": 64}):
        with pytest.raises(PlanError, match=rf"{next(iter(other))}[\s\S]*remove .*generated"):
            capture(model, out, **other)
    with pytest.raises(PlanError, match="MistralForCausalLM"):
        capture(TINY["mistral"](), out)
    with pytest.raises(PlanError, match="digest"):
        residua.capture_dataset(model, make_prompts()[1:], out=out, **SETTINGS)


@pytest.mark.parametrize("damage", ["cut", "other tokens", "no JSON", "other prompts", "large"])
def test_damaged_continuations_are_generated_again(damage: str, reference: Path, tmp_path: Path) -> None:
    model, out = TINY["llama"](), tmp_path / "a.zarr"
    with pytest.raises(StoppedError):
        capture(model, out, on_generated=stop_after(2))
    file = spool_of(out) / "continuations" / "1.json"
    before = file.read_bytes()
    found = json.loads(before)
    if damage == "other tokens":
        found["tokens"][0][0] += 1
    elif damage == "other prompts":
        found["prompts"] = found["prompts"][::-1]
    changed = {"cut": before[:-9], "no JSON": b"\xff{", "large": before + b" " * 2**20}
    file.write_bytes(changed.get(damage, json.dumps(found).encode()))
    result = capture(model, out)
    assert any("damaged" in note for note in result.notes)
    assert content(out) == content(reference)


def test_a_generation_that_is_killed_goes_on(forks: Forks, tmp_path: Path) -> None:
    dataset = tmp_path / "prompts.jsonl"
    texts = [" ".join(["the list"] * (1 + i % 4)) for i in range(8)]
    dataset.write_text("".join(json.dumps({"prompt": text, "label": i}) + "\n" for i, text in enumerate(texts)))
    generation = ["--generate", "6", "--temperature", "1", "--top-k", "50", "--batch-tokens", "32"]

    def words(name: str) -> list[str]:
        (tmp_path / name).mkdir()
        return [
            *("capture", "--model", str(MODEL), "--dataset", str(dataset), "--out", str(tmp_path / name / "a.zarr")),
            *("--sites", "resid_post.1", "--rows-per-shard", "32", *generation),
        ]

    whole = words("whole")
    ended = forks.run(whole)
    assert ended.code == 0, ended.output
    out = tmp_path / "killed" / "a.zarr"
    killed = words("killed")
    child = forks.start(killed, slow=0.02)
    child.await_file(spool_of(out) / "continuations" / "1.json")
    child.send_signal(signal.SIGKILL)
    assert child.wait().code == -signal.SIGKILL
    assert not out.exists()
    assert len(list((spool_of(out) / "continuations").glob("*.json"))) >= 2
    for step in (2, 5, 9):  # of those in which files become durable
        assert forks.run(killed, die_at=step).code in (-signal.SIGKILL, 0)
    ended = forks.run(killed)
    assert ended.code == 0, ended.output
    check_end(out, tmp_path / "whole" / "a.zarr")
    assert Archive(out).example_table.table(["label"])["label"].to_pylist() == list(range(8))


def test_a_bucket_gets_what_a_disk_gets(s3: S3Server, reference: Path) -> None:
    model, address = TINY["llama"](), s3.address("generated.zarr")
    with pytest.raises(StoppedError):
        capture(model, address, storage_options=s3.options, on_generated=stop_after(2))
    left = {entry.name for entry in ObjectFolder(s3.address(".generated.zarr.generated"), s3.options).list()}
    assert len([name for name in left if name.startswith("continuations/")]) == 2
    done = list[int]()
    capture(model, address, storage_options=s3.options, on_generated=lambda n, _: done.append(n))
    assert done[0] == 3
    folder = ObjectFolder(address, s3.options)
    found = {entry.name: folder.read(entry.name, entry.n_bytes) for entry in folder.list()}
    assert {name for name in found if name != "zarr.json"} == set(content(reference))
    for name in content(reference):
        assert found[name] == (reference / name).read_bytes()
    assert list(ObjectFolder(s3.address(".generated.zarr.generated"), s3.options).list()) == []
