"""Pairs from a file: lines end at newlines only, and what cannot be read is refused with its line or its pair."""

import json
from pathlib import Path
from typing import Any

import pytest

from residua.capture.patching.pair import Pair
from residua.pipelines.circuits.read_pairs import PairSource, read_pairs
from residua.store.base.errors import PlanError
from tests.capture.replay_samples import model_of

PAIR = {"clean": "ab", "corrupted": "cb", "answer": "c", "wrong": "d"}


class Letters:
    """A tokenizer for which each byte of a text is a token; the ids of a, b, c and d are 0 to 3."""

    def __call__(self, text: str, **_options: object) -> dict[str, list[int]]:
        return {"input_ids": [(byte - ord("a")) % 97 for byte in text.encode()]}

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(token + ord("a")) for token in ids)


TOKENIZER: Any = Letters()


def found(source: PairSource) -> list[Pair]:
    return read_pairs(source, model_of("llama"), tokenizer=TOKENIZER, archive=None)


@pytest.mark.parametrize("letter", ["\u2028", "\u2029", "\x85", "\x0c", "\x1c", "é"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_file_gives_what_its_rows_give(tmp_path: Path, letter: str, mark: bytes, end: bytes) -> None:
    if letter < " ":  # JSON spells these as escapes
        letter = "\t"
    pairs = [{**PAIR, "clean": f"a{letter}b", "corrupted": f"c{letter}b"}, PAIR]
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(mark + end.join(json.dumps(pair, ensure_ascii=False).encode() for pair in pairs) + end + end)
    assert found(path) == found(pairs)


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        (json.dumps({**PAIR, "clean": "é"}, ensure_ascii=False).encode("latin-1"), 2, "0xe9.* is not UTF-8"),
        (b'{"clean": "a", ', 2, "not JSON"),
        (b'{"clean": "a\x00"}', 2, "not JSON"),
        (b"[" * 100_000, 2, "not JSON"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, line: int, problem: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b"\n" + content + b"\n")
    with pytest.raises(PlanError, match=rf"pairs.jsonl' cannot be read: line {line}: .*{problem}"):
        found(path)


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(PAIR).encode("utf-16"))
    with pytest.raises(PlanError, match=r"line 1: .*UTF-16"):
        found(path)


@pytest.mark.parametrize("field", ["clean", "corrupted", "answer", "wrong"])
def test_half_a_surrogate_pair_names_the_pair(tmp_path: Path, field: str) -> None:
    pairs = [PAIR, {**PAIR, field: "a\ud800"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, pairs)))
    sources: list[PairSource] = [path, pairs]
    for source in sources:
        with pytest.raises(PlanError, match=r"pair 2: .*surrogate"):
            found(source)
