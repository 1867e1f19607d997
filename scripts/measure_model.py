"""Measurements of a small language model: loss on text, copying of repeats, and the attention of each head.

Axes: `B` examples in a batch, `T` positions, `H` heads, `Q`/`K` query and key position, `V` vocabulary. Losses are in
nats.
"""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from pydoc_text import END_OF_TEXT_ID, TokenIds
from transformers import LlamaForCausalLM

REPEAT_PERIOD = 50
REPEAT_EXAMPLES = 64
REPEAT_SEED = 123


@dataclass(frozen=True, kw_only=True)
class RepeatScores:
    """Losses and attention on BOS and then the same random block twice.

    Attributes:
        first_loss: Mean loss a token in the first copy.
        second_loss: Mean loss a token in the second copy, without its first token, which nothing predicts.
        induction: For each layer and head, mean attention from a token of the second copy to the token after the same
            token in the first copy (the stripe of the pattern at distance period - 1).
        previous_token: For each layer and head, mean attention to the previous token.
    """

    first_loss: float
    second_loss: float
    induction: list[list[float]]
    previous_token: list[list[float]]


def windows(tokens: TokenIds, n_positions: int, *, bos: bool) -> list[TokenIds]:
    """Cut a text into consecutive windows of at most `n_positions` tokens, including a BOS in front if `bos`."""
    n_text = n_positions - bos
    front = [END_OF_TEXT_ID] if bos else []
    return [np.array([*front, *tokens[i : i + n_text]]) for i in range(0, len(tokens) - 1, n_text)]


@torch.no_grad()
def text_loss(model: LlamaForCausalLM, tokens: TokenIds, n_positions: int, *, bos: bool) -> tuple[float, int]:
    """Return the mean loss a predicted token and the number of predicted tokens, over consecutive windows.

    With BOS, every token of the text is predicted once; without, all but the first token of each window.
    """
    total, n_predicted = 0.0, 0
    for window in windows(tokens, n_positions, bos=bos):
        tokens_BT = torch.from_numpy(window)[None]
        n_targets = len(window) - 1
        total += model(tokens_BT, labels=tokens_BT, use_cache=False).loss.item() * n_targets
        n_predicted += n_targets
    return total / n_predicted, n_predicted


def unigram_loss(train: TokenIds, held_out: TokenIds, n_vocab: int) -> float:
    """Return the loss of a prediction by frequency alone, with one added to each count."""
    counts = np.bincount(train, minlength=n_vocab) + 1.0
    return float(-np.log(counts / counts.sum())[held_out].mean())


@torch.no_grad()
def repeat_scores(
    model: LlamaForCausalLM, *, n_examples: int = REPEAT_EXAMPLES, period: int = REPEAT_PERIOD
) -> RepeatScores:
    """Measure copying and attention on seeded repeated random tokens."""
    rng = np.random.default_rng(REPEAT_SEED)
    block = rng.integers(1, model.config.vocab_size, (n_examples, period))
    bos = np.full((n_examples, 1), END_OF_TEXT_ID)
    tokens_BT = torch.from_numpy(np.concatenate([bos, block, block], axis=1))
    watched = copy.deepcopy(model)
    watched.set_attn_implementation("eager")  # the only implementation that returns patterns
    output = watched(tokens_BT, output_attentions=True, use_cache=False)
    logp_BTV = output.logits[:, :-1].log_softmax(-1)
    loss_BT = -logp_BTV.gather(-1, tokens_BT[:, 1:, None])[..., 0]

    def stripe(pattern_BHQK: torch.Tensor, distance: int) -> list[float]:
        on_stripe = pattern_BHQK.diagonal(-distance, -2, -1)[..., -period:]
        scores: list[float] = on_stripe.mean((0, -1)).tolist()
        return scores

    return RepeatScores(
        first_loss=loss_BT[:, :period].mean().item(),
        second_loss=loss_BT[:, period + 1 :].mean().item(),
        induction=[stripe(pattern, period - 1) for pattern in output.attentions],
        previous_token=[stripe(pattern, 1) for pattern in output.attentions],
    )


def without_attention(model: LlamaForCausalLM, layer: int) -> LlamaForCausalLM:
    """Return a copy of a model in which one layer's attention adds nothing to the residual stream."""
    ablated = copy.deepcopy(model)
    torch.nn.init.zeros_(ablated.get_parameter(f"model.layers.{layer}.self_attn.o_proj.weight"))
    return ablated


def best_score(scores: list[list[float]]) -> float:
    """Return the highest score of any head."""
    return max(map(max, scores))


def per_byte_perplexity(loss: float, n_tokens: int, n_bytes: int) -> float:
    """Convert a mean loss a token to a perplexity a byte, which does not depend on the tokenizer."""
    return math.exp(loss * n_tokens / n_bytes)
