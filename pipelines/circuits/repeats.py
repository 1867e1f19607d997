"""Sequences of repeated random tokens, on which induction heads show (Olsson et al. 2022)."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from residua.pipelines.circuits.circuit_settings import RepeatSettings
from residua.pipelines.data.tokenizer import special_ids
from residua.pipelines.setup.models import token_limit
from residua.store.base.errors import PlanError

_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "unk_token_id")


def repeated_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, settings: RepeatSettings
) -> list[dict[str, Any]]:
    """Return the sequences as rows of a dataset, with the columns ``input_ids`` and ``period``.

    The tokens of a block are distinct, so that each occurs once in every earlier copy. Special tokens, and ids that the
    tokenizer does not know, are not used.

    Raises:
        PlanError: The model does not take that many tokens, has too few to choose from, or has no BOS token.
    """
    config = model.config.get_text_config()
    bos = _bos_id(config, tokenizer) if settings.bos is not False else None
    if settings.bos and bos is None:
        raise PlanError("a BOS was asked for, and neither the tokenizer nor the config of this model names one")
    length, limit = settings.period * settings.copies + (bos is not None), token_limit(model)
    if limit is not None and length > limit:
        raise PlanError(
            f"{settings.copies} copies of {settings.period} tokens are {length} tokens, counting a BOS, and the model "
            f"takes {limit}: choose a shorter period or fewer copies"
        )
    ids = plain_ids(config, tokenizer)
    if len(ids) < settings.period:
        raise PlanError(f"a block of {settings.period} different tokens was asked for; the model has {len(ids)}")
    rng = np.random.default_rng(settings.seed)
    blocks = (rng.choice(ids, settings.period, replace=False).tolist() for _ in range(settings.n_examples))
    start = [] if bos is None else [bos]
    return [{"input_ids": start + block * settings.copies, "period": settings.period} for block in blocks]


def _bos_id(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """Return the token that starts a text: BOS or CLS of the tokenizer, or of the config without a tokenizer."""
    source = config if tokenizer is None else tokenizer
    found = (getattr(source, name, None) for name in ("bos_token_id", "cls_token_id"))
    return next((token for token in found if isinstance(token, int)), None)


def plain_ids(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> npt.NDArray[np.int64]:
    """Return the ids of text tokens, sorted."""
    known = set(range(config.vocab_size) if tokenizer is None else tokenizer.get_vocab().values())
    known -= set(_special_ids(config, tokenizer))
    return np.array(sorted(token for token in known if 0 <= token < config.vocab_size), np.int64)


def _special_ids(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[int]:
    for name in _SPECIAL_TOKENS:
        found = getattr(config, name, None)
        yield from [found] if isinstance(found, int) else found or []
    yield from special_ids(tokenizer)
