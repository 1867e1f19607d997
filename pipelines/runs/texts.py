"""Texts of tokens, with the tokenizer of an archive or of a model."""

from collections.abc import Callable, Sequence

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from residua.store.base.errors import PlanError
from residua.store.read.text import single_token, token_texts


class Texts:
    """Turns tokens into texts and back.

    Args:
        tokenizer: The tokenizer: one of the `tokenizers` package, one of transformers, or None.
        place: What has it, for messages.
        load: Looks for a tokenizer when it is first needed, if `tokenizer` is None.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | PreTrainedTokenizerBase | None,
        place: str,
        load: Callable[[], PreTrainedTokenizerBase | None] = lambda: None,
    ) -> None:
        self._tokenizer = tokenizer
        self._place = place
        self._load = load

    @property
    def is_known(self) -> bool:
        """Whether there is a tokenizer."""
        if self._tokenizer is None:
            self._tokenizer, self._load = self._load(), lambda: None
        return self._tokenizer is not None

    @property
    def of_model(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, if it is one of transformers."""
        return self._tokenizer if self.is_known and isinstance(self._tokenizer, PreTrainedTokenizerBase) else None

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of some tokens, special ones included.

        Raises:
            PlanError: There is no tokenizer.
        """
        return str(self.require("a text was asked for").decode(list(tokens), skip_special_tokens=False))

    def of_each(self, tokens: Sequence[int]) -> list[str | None]:
        """Return the text of each token as it stands inside a text; None for a part of a character.

        Raises:
            PlanError: There is no tokenizer.
        """
        tokenizer = self.require("the texts of tokens were asked for")
        fast = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
        if isinstance(fast, Tokenizer):
            return token_texts(fast, tokens)
        return [str(tokenizer.decode([token])) for token in tokens]

    def labels(self, tokens: Sequence[int]) -> list[str]:
        """Return a short label for each token: its text with signs for spaces and line ends, or its id."""
        texts = self.of_each(tokens) if self.is_known else [None] * len(tokens)
        return [
            str(token) if text is None else repr(text)[1:-1].replace(" ", "\u00b7") or str(token)
            for token, text in zip(tokens, texts, strict=True)
        ]

    def token(self, token: int | str) -> int:
        """Return the id of a token that is given by its id or its text.

        Raises:
            PlanError: There is no tokenizer to look a text up, or it is no token or several.
        """
        if not isinstance(token, str):
            return int(token)
        tokenizer = self.require(f"the token {token[:60]!r} was asked for")
        if isinstance(tokenizer, Tokenizer):
            ids = tokenizer.encode(token, add_special_tokens=False).ids
        else:
            ids = list(tokenizer(token, add_special_tokens=False)["input_ids"])
        return single_token(token, ids, lambda one: self.text([one]))

    def require(self, what: str) -> "Tokenizer | PreTrainedTokenizerBase":
        """Return the tokenizer.

        Args:
            what: What it is needed for, for the message.

        Raises:
            PlanError: There is no tokenizer.
        """
        if not self.is_known or self._tokenizer is None:
            raise PlanError(f"{what}, and {self._place} has no tokenizer: pass tokenizer=, or use token ids")
        return self._tokenizer
