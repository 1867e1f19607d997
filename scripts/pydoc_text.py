"""The training text of the shipped model, its held-out split, and its tokenizer.

The text is `pydoc_data.topics`: the language reference that every Python has for `help()`. The last tenth of the
topics, by name, is held out. Some paragraphs occur in two topics ("with" is repeated inside "compound"). A training
paragraph that also occurs in a held-out topic is removed, so that the model cannot have learned held-out text by heart.
"""

from dataclasses import dataclass
from pydoc_data.topics import topics

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TokenIds = npt.NDArray[np.int64]

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
BLANK_LINE = "\n\n"


@dataclass(frozen=True, kw_only=True)
class PydocText:
    """The training text and the held-out text.

    Attributes:
        train: Training topics, joined by blank lines.
        held_out: Held-out topics, joined by blank lines.
        held_out_topics: Names of the held-out topics, sorted.
        n_chars_dropped: Characters of the training paragraphs removed because they also occur in the held-out text.
    """

    train: str
    held_out: str
    held_out_topics: list[str]
    n_chars_dropped: int


def read_pydoc_text() -> PydocText:
    """Read the topics of the running Python, and hold out the last tenth."""
    names = sorted(topics)
    n_held_out = -(-len(names) // 10)
    train = BLANK_LINE.join(topics[name] for name in names[:-n_held_out])
    held_out = BLANK_LINE.join(topics[name] for name in names[-n_held_out:])
    seen = set(held_out.split(BLANK_LINE))
    kept = BLANK_LINE.join(paragraph for paragraph in train.split(BLANK_LINE) if paragraph not in seen)
    return PydocText(
        train=kept,
        held_out=held_out,
        held_out_topics=names[-n_held_out:],
        n_chars_dropped=len(train) - len(kept),
    )


def train_tokenizer(text: str, n_vocab: int, n_positions: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: it encodes any text, and decoding returns the text unchanged.

    The tokenizer adds no special token; callers add one in front if they want it, as with GPT-2.

    Args:
        text: Training text.
        n_vocab: Size of the vocabulary, including the special token and 256 bytes.
        n_positions: Longest sequence of the model, stated in the tokenizer's configuration.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=n_positions,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> TokenIds:
    """Return the token ids of a text of any length, without special tokens."""
    return np.array(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
