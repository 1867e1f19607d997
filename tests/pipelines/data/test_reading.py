"""What examples follow from: every change that may change them changes its digest, or there is no digest."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from residua.pipelines.data import reading
from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.pipelines.data.reading import reading_of
from residua.store.base.errors import DatasetError
from tests.pipelines.dataset_samples import make_tokenizer


def digest(source: object, tokenizer: Any = None, *, limit: int | None = 64, **settings: Any) -> str | None:
    found = reading_of(source, DatasetSettings(**settings), tokenizer=tokenizer, model_limit=limit, vocab_size=128)
    return None if found is None else found.digest


def write(path: Path, *rows: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def test_the_same_files_and_settings_have_the_same_digest(tmp_path: Path) -> None:
    path = write(tmp_path / "data" / "a.jsonl", "one", "two")
    assert digest(path) == digest(str(path)) != digest(path.parent) == digest(path.parent)
    assert len({digest(path), digest(path, limit=32), digest(path, min_length=2), digest(path, positions="last")}) == 4


def same_size(path: Path) -> None:
    write(path, "two", "one")


def with_old_time(path: Path) -> None:
    """As `touch -r` does, after a change of the content."""
    before = path.stat()
    write(path, "two", "one")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def put_in_its_place(path: Path) -> None:
    write(path.with_name("b.jsonl"), "two", "one").replace(path)


def another_file(path: Path) -> None:
    write(path.with_name("b.jsonl"), "three")


@pytest.mark.parametrize("change", [same_size, with_old_time, put_in_its_place, another_file])
def test_changed_files_have_another_digest(tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = write(tmp_path / "data" / "a.jsonl", "one", "two")
    before = digest(path.parent)
    change(path)
    assert None is not digest(path.parent) != before


def test_what_changed_just_before_or_while_it_was_read_is_in_doubt(tmp_path: Path) -> None:
    path, settings = write(tmp_path / "a.jsonl", "x"), DatasetSettings()
    found = reading_of(path, settings, tokenizer=None, model_limit=None, vocab_size=None)
    assert found is not None
    assert not found.held(path, settings, found.changed_ns + 10**9)
    assert found.held(path, settings, found.changed_ns + 3 * 10**9)
    write(path, "y")
    assert not found.held(path, settings, found.changed_ns + 3 * 10**9)


def test_what_may_hold_other_data_has_no_digest(tmp_path: Path) -> None:
    folder = write(tmp_path / "data" / "a.jsonl", "one").parent
    made = datasets.Dataset.from_dict({"text": ["a"]})
    doubtful = [
        ["a text"],
        pa.table({"text": ["a"]}).to_pandas(),
        made.to_iterable_dataset(),
        made.with_transform(lambda rows: rows),
        datasets.DatasetDict({"train": made}),
    ]
    assert [digest(source) for source in doubtful] == [None] * len(doubtful)
    (folder / "README.md").write_text("---\nconfigs:\n- data_files: ../other.jsonl\n---\n")
    assert digest(folder) is None
    (folder / "README.md").write_text("Some data.\n")
    assert digest(folder) is not None
    (folder / "more").symlink_to(tmp_path, target_is_directory=True)
    assert digest(folder) is None
    with pytest.raises(DatasetError, match="nowhere"):
        digest(tmp_path / "nowhere.jsonl")


def test_datasets_are_known_by_their_content() -> None:
    first, same, other = (datasets.Dataset.from_dict({"text": texts}) for texts in (["a"], ["a"], ["b"]))
    assert digest(first) == digest(same) != digest(other)
    assert digest(first.with_format("arrow", columns=["text"])) not in (None, digest(first))


def test_tokenizers_are_known_by_what_they_do() -> None:
    source, tokenizer = datasets.Dataset.from_dict({"text": ["a"]}), make_tokenizer()
    before = digest(source, tokenizer)
    assert None is not before == digest(source, tokenizer) != digest(source)
    tokenizer.chat_template = "{{ messages }}"
    assert digest(source, tokenizer) != before
    tokenizer.chat_template = None
    tokenizer.add_tokens(["aardvark"])
    assert digest(source, tokenizer) != before

    class Own(type(tokenizer)):  # type: ignore[misc]  # known at run time
        pass

    tokenizer.__class__ = Own
    assert digest(source, tokenizer) is None


def test_other_packages_may_read_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    source = datasets.Dataset.from_dict({"text": ["a"]})
    before = digest(source)
    monkeypatch.setattr(reading, "version", lambda name: f"another {name}")
    assert None is not digest(source) != before
