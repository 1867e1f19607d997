"""The text the shipped model learns from, its split, and its tokenizer.

The text is `pydoc_data.topics`: the language reference that every Python carries for `help()`. The last
tenth of the topics, in the order of their names, is held out. Some paragraphs stand in two topics ("with" is
repeated inside "compound"); a training paragraph that also stands in a held-out topic is dropped, so that the
held-out loss cannot be read from memory.
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
    """The two parts of the text.

    Attributes:
        train: Training part, topics joined by blank lines.
        held_out: Held-out part, topics joined by blank lines.
        held_out_topics: Names of the held-out topics, sorted.
        n_chars_dropped: Characters of the training paragraphs dropped, being held out as well.
    """

    train: str
    held_out: str
    held_out_topics: list[str]
    n_chars_dropped: int


def read_pydoc_text() -> PydocText:
    """Read and split the topics of the running Python."""
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
    """Train a byte-level BPE tokenizer, which can spell any text and gives it back unchanged.

    No special token is added to a text; whoever wants one in front writes it, as with GPT-2.

    Args:
        text: Training text.
        n_vocab: Size of the vocabulary, special token and 256 bytes included.
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
    """Give the tokens of a text of any length, with nothing added."""
    return np.array(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
