"""Special tokens are all that the tokenizer's file flags; a folder without tokenizer files has no tokenizer."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken
from transformers import PreTrainedModel

from residua.pipelines.capture.capture import capture_dataset
from residua.pipelines.circuits.repeats import plain_ids
from residua.pipelines.data.tokenizer import knows_text, special_ids, start_tokens, token_ids
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.pipelines.setup.models import load_tokenizer
from residua.store.base.errors import DatasetError, PlanError
from tests.models.tiny import TINY
from tests.pipelines.dataset_samples import WORDS, make_tokenizer

HEADER, NAMED, WORD = "<|header|>", "<|named|>", "added"
N = len(WORDS)
SETTINGS = CaptureSettings()


def with_added_tokens() -> Any:
    tokenizer: Any = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [NAMED]})
    tokenizer.add_tokens([AddedToken(HEADER, special=True), AddedToken(WORD, special=False)])
    return tokenizer


def test_special_are_the_named_and_the_flagged() -> None:
    tokenizer = with_added_tokens()
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in (NAMED, HEADER, WORD)}
    assert special_ids(tokenizer) == {0, 1, 2, ids[NAMED], ids[HEADER]}
    assert special_ids(None) == frozenset()
    config = TINY["llama"]().config
    assert set(plain_ids(config, tokenizer).tolist()) == {*range(3, N), ids[WORD]}


def test_drop_special_drops_every_special_token(llama: PreTrainedModel, tmp_path: Path) -> None:
    text = f"a {HEADER} b {NAMED} {WORD} c"
    result = capture_dataset(
        llama, [text, HEADER], out=tmp_path / "a.zarr", tokenizer=with_added_tokens(), sites="embed", drop_special=True
    )
    kept = with_added_tokens().convert_ids_to_tokens(result.archive.rows.token[:].tolist())
    assert kept == ["a", "b", WORD, "c"]
    assert any("1 examples have no position" in note for note in result.notes)


BACKEND: Any = transformers.TokenizersBackend


def in_capitals(tokenizer: Any, text: Any, **options: Any) -> Any:
    return BACKEND._encode_plus(
        tokenizer, text.upper() if isinstance(text, str) else [*map(str.upper, text)], **options
    )


SHOUTING: Any = type("Shouting", (BACKEND,), {"_encode_plus": in_capitals})
TEXTS = ["a b c", f"{HEADER} a {NAMED}{WORD} b", "", "zzz unknown", "a " * 700, " a  b\n\u00e9 \U0001f600"]


@pytest.mark.parametrize("with_special", [True, False])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("kind", ["words", "shipped", "limited", "shouting"])
def test_texts_have_the_ids_that_transformers_gives_them(kind: str, split: bool, with_special: bool) -> None:
    tokenizer = make_tokenizer(single="<s> $A </s>") if kind == "limited" else with_added_tokens()
    if kind == "shipped":
        tokenizer = transformers.AutoTokenizer.from_pretrained("models/pydoc-1m")
    if kind == "shouting":
        tokenizer = SHOUTING(tokenizer_object=tokenizer.backend_tokenizer, unk_token=WORDS[2])
    if kind == "limited":  # whoever used it before may have left it cutting and padding
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer(["a b c d", "a"], truncation=True, max_length=3, padding=True)
    tokenizer.split_special_tokens = split
    wanted = [tokenizer(text, add_special_tokens=with_special, verbose=False)["input_ids"] for text in TEXTS]
    found = token_ids(tokenizer, TEXTS, with_special=with_special)
    assert [list(ids) for ids in found] == wanted
    assert token_ids(tokenizer, [], with_special=with_special) == []


def test_start_tokens() -> None:
    assert start_tokens(make_tokenizer(single="<s> $A </s>")).tolist() == [0]
    assert start_tokens(make_tokenizer(single="$A </s>")).tolist() == []
    assert start_tokens(None).tolist() == []


@pytest.mark.parametrize("name", ["gemma2", "bert", "gpt2", "llama", "qwen3_moe", "t5"])
def test_a_folder_without_tokenizer_files_has_no_tokenizer(name: str, tmp_path: Path) -> None:
    if name == "t5":
        transformers.T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1).save_pretrained(tmp_path)
    else:
        TINY[name]().config.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), SETTINGS) is None


@pytest.mark.parametrize("name", ["gpt2"])
def test_texts_need_a_tokenizer_before_anything_runs(name: str, tmp_path: Path) -> None:
    TINY[name]().save_pretrained(tmp_path / "model")
    with pytest.raises(DatasetError, match="without a tokenizer"):
        capture_dataset(tmp_path / "model", ["hello world"], out=tmp_path / "a.zarr", sites="embed")
    empty = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert not knows_text(empty)
    with pytest.raises(DatasetError, match="knows no text"):
        capture_dataset(TINY[name](), ["hello"], out=tmp_path / "a.zarr", tokenizer=empty, sites="embed")
    result = capture_dataset(tmp_path / "model", [[1, 2, 3]], out=tmp_path / "a.zarr", sites="embed")
    assert result.archive.tokenizer is None


def test_tokenizer_files_without_a_vocabulary_are_refused(tmp_path: Path) -> None:
    TINY["gpt2"]().config.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(PlanError, match=r"no vocabulary: .* only tokenizer_config\.json"):
        load_tokenizer(str(tmp_path), SETTINGS)


def test_a_tokenizer_of_bytes_needs_no_vocabulary() -> None:
    make: Any = transformers.ByT5Tokenizer
    assert knows_text(make())
    assert knows_text(make_tokenizer())
