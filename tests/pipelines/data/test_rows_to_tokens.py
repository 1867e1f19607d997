"""Texts become tokens one batch ahead of what is used, in a thread of its own, and nothing else changes."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from residua.pipelines.data import rows_to_tokens, sources
from residua.pipelines.data.dataset import read_examples
from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.store.base.errors import DatasetError
from tests.pipelines.dataset_samples import TOKENIZER, ids

TEXTS = ["a b", "b", "a", "b a b", "a a"]
SECONDS = 60


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_to_tokens, "_TEXTS_AT_ONCE", 2)
    monkeypatch.setattr(sources, "_ROWS_AT_ONCE", 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path, TEXTS)


def write(folder: Path, texts: list[Any]) -> Path:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


class Watched:
    """The sample tokenizer; notes the first texts of its calls, and their threads."""

    def __init__(self) -> None:
        self.chat_template = None
        self.calls: list[tuple[str, bool]] = []
        self.has_come_to = {text: threading.Event() for text in TEXTS}

    def __getattr__(self, name: str) -> Any:
        return getattr(TOKENIZER, name)

    def __call__(self, text: Any, **options: Any) -> Any:
        if isinstance(text, list):
            self.calls.append((text[0], threading.current_thread() is threading.main_thread()))
            if event := self.has_come_to.get(text[0]):
                event.set()
        make: Any = TOKENIZER
        return make(text, **options)


def read(source: object, tokenizer: Any, **settings: Any) -> Iterator[list[int]]:
    for example in read_examples(source, settings=DatasetSettings(**settings), tokenizer=tokenizer):
        yield example.input_ids.tolist()


def test_the_next_batch_becomes_tokens_while_one_is_used(path: Path) -> None:
    tokenizer = Watched()
    found = read(path, tokenizer)
    first = next(found)
    assert tokenizer.has_come_to["a"].wait(SECONDS)  # the second batch, of which nothing was asked for
    assert [first, *found] == [ids(f"<s> {text}") for text in TEXTS]
    assert [is_main for _, is_main in tokenizer.calls] == [False] * 3


@pytest.mark.parametrize("kind", ["texts", "generator", "transform", "stream"])
def test_where_code_of_the_user_runs_all_is_in_one_thread(kind: str) -> None:
    made = datasets.Dataset.from_dict({"text": TEXTS})
    by_kind = {
        "texts": TEXTS,
        "generator": (text for text in TEXTS),
        "transform": made.with_transform(lambda rows: rows),
        "stream": made.to_iterable_dataset().map(lambda row: row),
    }
    tokenizer = Watched()
    assert list(read(by_kind[kind], tokenizer)) == [ids(f"<s> {text}") for text in TEXTS]
    assert all(is_main for _, is_main in tokenizer.calls)


def test_an_error_comes_after_the_rows_before_it(tmp_path: Path) -> None:
    path = write(tmp_path, ["a", "b", "a b", 7])
    with path.open("a") as file:
        file.write("no json\n")
    found = read(path, TOKENIZER)
    assert [next(found), next(found)] == [ids("<s> a"), ids("<s> b")]
    with pytest.raises(DatasetError):
        list(found)
    assert list(read(path, TOKENIZER, max_tokens=3)) == [ids("<s> a"), ids("<s>")]
