"""What a capture needs of a transformers tokenizer: its start tokens, its special tokens, whether it knows any text."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from residua.capture.runtime.compat import PLAIN_CALL
from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.store.base.errors import DatasetError
from residua.store.base.naming import named
from residua.store.selection.positions import IntArray

_IDS_ALONE = {"return_attention_mask": False, "return_token_type_ids": False}
_MARKS_OF_SPACE = "\u2581\u0120 "  # SentencePiece's and the byte-level alphabet's, which an empty tokenizer may have


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    chat_template: Any

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of the special tokens that have a name."""
        ...

    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]:
        """Tokenize texts."""
        ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Render chats as text and tokenize them."""
        ...

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """Return the source of the chat template that these arguments choose."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Return the ids of all tokens by their text."""
        ...


def token_ids(tokenizer: Tokenizer, texts: Sequence[str], *, with_special: bool) -> list[Any]:
    """Return the token ids of each text, as arrays or lists.

    A tokenizer of transformers that is written in Rust is asked itself, without the place of each token in its text,
    which would take longer than all the rest. The first text goes through transformers, which sets the tokenizer up;
    its ids have to be the same both ways, or all texts go through transformers.

    Args:
        tokenizer: The tokenizer.
        texts: The texts.
        with_special: Whether special tokens, such as a BOS, are put around each.
    """
    if not texts:
        return []
    options: dict[str, Any] = {"add_special_tokens": with_special, "verbose": False}
    options |= _IDS_ALONE if isinstance(tokenizer, PreTrainedTokenizerBase) else {}
    if len(texts) > 1 and _is_plain(tokenizer):
        first = list(tokenizer(list(texts[:1]), **options)["input_ids"][0])
        backend: Any = tokenizer
        found = backend.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=with_special)
        if found[0].ids == first:
            return [np.fromiter(encoding.ids, np.int32, len(encoding)) for encoding in found]
    return list(tokenizer(list(texts), **options)["input_ids"])


def _is_plain(tokenizer: object) -> bool:
    """Return whether a tokenizer does what transformers' own class does with texts, and nothing else."""
    kind: Any = type(tokenizer)
    return isinstance(tokenizer, TokenizersBackend) and all(
        getattr(kind, name, None) is getattr(TokenizersBackend, name, None) for name in PLAIN_CALL
    )


def start_tokens(tokenizer: Tokenizer | None) -> IntArray:
    """Return the tokens that `tokenizer` puts before every text, such as a BOS: int32, often none or one."""
    if tokenizer is None:
        return np.zeros(0, np.int32)
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    n_start = next((i for i in range(len(full)) if plain and full[i : i + len(plain)] == plain), 0)
    return np.array(full[:n_start], np.int32)


def special_ids(tokenizer: Tokenizer | None) -> frozenset[int]:
    """Return the ids of all special tokens: the named ones (BOS, ...), and those that the tokenizer's file flags so.

    Named ones alone are few: of the 256 special tokens of Llama 3, ``all_special_ids`` has two.
    """
    if tokenizer is None:
        return frozenset()
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if getattr(token, "special", False)}


def require_special(settings: DatasetSettings, tokenizer: Tokenizer | None) -> None:
    """Raise DatasetError if rows of special tokens are to be left out, and nothing says which tokens these are."""
    if settings.drop_special and tokenizer is None:
        raise DatasetError(
            f"{named('drop_special', True)} needs a tokenizer, and the model has none: nothing says which tokens are "
            "special"
        )


def knows_text(tokenizer: Tokenizer) -> bool:
    """Return whether `tokenizer` has a token that is not an added one, such as BOS.

    transformers 5 makes a tokenizer that has none of a folder without tokenizer files: it turns every text into
    nothing, or into unknown tokens.
    """
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    return any(i not in added and text.strip(_MARKS_OF_SPACE) for text, i in tokenizer.get_vocab().items())
