"""The text around a token can be read: whole characters, and every space."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from residua.store.read.text import text_around, token_texts

TEXTS = ["end of it 😂 x", "äö 漢字 and more", " a  b", "😂😂", "x"]


def byte_level() -> Tokenizer:
    """Return a tokenizer with a token a byte, as GPT-2 and Qwen have where a text is rare."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Return a tokenizer with a token a letter and bytes for the others, as Llama 2 has."""
    vocab = [*(f"<0x{i:02X}>" for i in range(256)), *"▁abcdefghijklmnopqrstuvwxyzäö", "▁of", "of"]
    unknown = {"unk_token": "<0x00>"}
    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(vocab)},
            merges=[("o", "f"), ("▁", "of")],
            byte_fallback=True,
            **unknown,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
@pytest.mark.parametrize("text", [f"x{text}" for text in TEXTS])
def test_a_tokens_own_text_is_that_inside_a_text(make: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text).ids
    for at, found in list(enumerate(token_texts(tokenizer, ids)))[1:]:
        shown = text_around(tokenizer, ids, at, 0)[1:-1]
        is_part = "\ufffd" in tokenizer.decode([ids[at]])
        assert (found is None) == is_part
        assert is_part or found == shown


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("context", [0, 1, 2, 3, 100])
def test_every_token_is_shown_in_a_part_of_the_text(make: Callable[[], Tokenizer], text: str, context: int) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text).ids
    whole = tokenizer.decode(ids)
    assert whole.strip() == text.strip()
    covered = 0
    for at in range(len(ids)):
        before, rest = text_around(tokenizer, ids, at, context).split("«")
        here, after = rest.split("»")
        assert "\ufffd" not in before + here + after
        assert before + here + after in whole
        assert len(before + here + after) <= 2 * context + 1 + 2
        if context == 100:
            assert before + here + after == whole
            assert len(before) <= covered <= len(before + here), "tokens follow each other without a gap"
            covered = max(covered, len(before + here))
    assert context < 100 or covered == len(whole)


def test_spaces_beside_the_mark_stay() -> None:
    tokenizer = sentence_piece()
    ids = tokenizer.encode("end of it").ids
    shown = [text_around(tokenizer, ids, at, 1) for at in range(len(ids))]
    assert [piece for piece in shown if "« of»" in piece] == ["d« of» "]


def test_a_decoder_that_joins_in_its_own_way_still_shows_the_token() -> None:
    words = {"un": 0, "##able": 1, ".": 2, "do": 3, "not": 4}
    tokenizer = Tokenizer(models.WordPiece(vocab=words, unk_token="un"))  # noqa: S106  # no password
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    assert text_around(tokenizer, [0, 1, 2], 1, 5) == "un«able»."
    for at in range(3):
        assert "«" in text_around(tokenizer, [3, 4, 2], at, 5)


def test_bytes_that_are_no_character_are_shown() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("a😂").ids[:3]
    assert text_around(tokenizer, ids, 0, 5).startswith("«a»")
    assert "\ufffd" in text_around(tokenizer, ids, 1, 5)


def test_a_space_that_the_decoder_puts_between_words_is_not_the_tokens() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))  # noqa: S106  # no password
    assert [text_around(words, [0, 1, 2], at, 5) for at in range(3)] == ["«a» b c", "a «b» c", "a b «c»"]
    pieces = Tokenizer(models.WordPiece({"un": 0, "##able": 1, "do": 2}, unk_token="un"))  # noqa: S106  # no password
    pieces.decoder = decoders.WordPiece()
    assert [text_around(pieces, [2, 0, 1], at, 5) for at in range(3)] == ["«do» unable", "do «un»able", "do un«able»"]
