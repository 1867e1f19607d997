"""The two phases of the training of the shipped model.

A small model on little text rarely learns induction (copying what followed the same token before) by itself. So phase
1 trains two blocks on repeated random tokens only, with one head of the first block started as a previous-token head,
until the second block copies by induction (Olsson et al. 2022, arXiv:2209.11895). Phase 2 puts these two blocks among
new ones that start as the identity, and trains all of them on text mixed with repeats.

Arrays of tokens are int64, (examples, positions). Axes: `B` examples in a batch, `T` positions, `V` vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from pydoc_text import END_OF_TEXT_ID, TokenIds
from torch.nn.functional import cross_entropy
from torch.optim import Adam, Muon, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All numbers of the training except seeds.

    Attributes:
        n_vocab: Size of the vocabulary.
        width: Width of the residual stream.
        n_layers: Blocks of the final model.
        n_heads: Query heads of a block.
        n_kv_heads: Key and value heads of a block.
        mlp_width: Width inside the MLP.
        n_positions: Longest sequence of the model.
        rope_base: Base of the rotary embedding's frequencies.
        circuit_layers: Layers of the final model that the two blocks of phase 1 become.
        circuit_batch: Sequences and tokens of a batch of phase 1.
        circuit_steps: Steps after which an attempt at phase 1 ends without success.
        previous_token_score: Starting attention score of the previous-token head, before softmax.
        text_steps: Steps of phase 2.
        batch: Sequences and tokens of most batches of phase 2.
        long_batch: Sequences and tokens of every fourth batch, which trains the full context.
        repeat_share: Share of the sequences of phase 2 that are repeated random tokens.
        bos_share: Share of the sequences of phase 2 that start with BOS; without others, the model would need BOS.
        matrix_rate: Peak learning rate of Muon, for the matrices inside blocks.
        other_rate: Peak learning rate of Adam, for embedding, norms and biases.
        weight_decay: Weight decay of the matrices in phase 2.
        warmup_steps: Steps over which the rates rise from zero, in both phases.
        hold_share: Share of phase 2 at the peak rates, before they fall linearly.
    """

    n_vocab: int = 1024
    width: int = 128
    n_layers: int = 6
    n_heads: int = 4
    n_kv_heads: int = 2
    mlp_width: int = 256
    n_positions: int = 512
    rope_base: float = 10_000.0
    circuit_layers: tuple[int, int] = (1, 3)
    circuit_batch: tuple[int, int] = (16, 64)
    circuit_steps: int = 600
    previous_token_score: float = 60.0
    text_steps: int = 800
    batch: tuple[int, int] = (16, 128)
    long_batch: tuple[int, int] = (4, 512)
    repeat_share: float = 0.25
    bos_share: float = 0.5
    matrix_rate: float = 0.02
    other_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup_steps: int = 30
    hold_share: float = 0.4


def build_model(recipe: Recipe, n_layers: int) -> LlamaForCausalLM:
    """Build a model with fresh weights from torch's global generator, float32 on the CPU."""
    config = LlamaConfig(
        vocab_size=recipe.n_vocab,
        hidden_size=recipe.width,
        intermediate_size=recipe.mlp_width,
        num_hidden_layers=n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_kv_heads,
        max_position_embeddings=recipe.n_positions,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_base},
        tie_word_embeddings=True,
        attention_bias=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
    )
    return LlamaForCausalLM(config)


def start_previous_token_head_(model: LlamaForCausalLM, recipe: Recipe) -> None:
    """Set query and key biases of the first block so that its head 0 attends to the previous token.

    Rotary embedding rotates a vector in proportion to its position. A constant key that starts rotated by one position
    has its largest product with a constant query one position later. This product is the wanted score.
    """
    d_head = recipe.width // recipe.n_heads
    angle = recipe.rope_base ** (-torch.arange(0, d_head, 2).float() / d_head)
    length = (recipe.previous_token_score * math.sqrt(d_head) / (d_head / 2)) ** 0.5
    query = torch.cat([torch.full_like(angle, length), torch.zeros_like(angle)])
    key = length * torch.cat([angle.cos(), angle.sin()])
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.q_proj.bias")[:d_head] = query
        model.get_parameter("model.layers.0.self_attn.k_proj.bias")[:d_head] = key


def repeated_tokens(rng: np.random.Generator, n_vocab: int, shape: tuple[int, int], longest: int) -> TokenIds:
    """Draw sequences of BOS and then one random block of 8 to `longest` tokens, repeated to the end."""
    batch = np.full(shape, END_OF_TEXT_ID, dtype=np.int64)
    for row in batch:
        block = rng.integers(1, n_vocab, int(rng.integers(8, longest + 1)))
        row[1:] = np.resize(block, len(row) - 1)
    return batch


def text_windows(rng: np.random.Generator, tokens: TokenIds, shape: tuple[int, int]) -> TokenIds:
    """Cut random windows from a text, and replace the first token of each by BOS."""
    n_examples, n_tokens = shape
    starts = rng.integers(0, len(tokens) - n_tokens, n_examples)
    windows = np.stack([tokens[start : start + n_tokens] for start in starts])
    windows[:, 0] = END_OF_TEXT_ID
    return windows


def mixed_batch(rng: np.random.Generator, recipe: Recipe, tokens: TokenIds, shape: tuple[int, int]) -> TokenIds:
    """Draw a batch of phase 2: repeats and text, each sequence with or without BOS."""
    n_examples, n_tokens = shape
    n_repeated = round(n_examples * recipe.repeat_share)
    repeats = repeated_tokens(rng, recipe.n_vocab, (n_repeated, n_tokens + 1), n_tokens // 2)
    windows = text_windows(rng, tokens, (n_examples - n_repeated, n_tokens + 1))
    batch = np.concatenate([repeats, windows])
    with_bos = rng.random(n_examples) < recipe.bos_share
    return np.where(with_bos[:, None], batch[:, :-1], batch[:, 1:])


def make_optimizers(model: LlamaForCausalLM, recipe: Recipe, weight_decay: float) -> list[Optimizer]:
    """Return Muon for the matrices inside blocks and Adam for all other parameters."""
    blocks = set(model.model.layers.parameters())
    matrices = [p for p in model.parameters() if p in blocks and p.ndim == 2]
    others = [p for p in model.parameters() if not (p in blocks and p.ndim == 2)]
    return [
        Muon(matrices, lr=recipe.matrix_rate, weight_decay=weight_decay),
        Adam(others, lr=recipe.other_rate, betas=(0.9, 0.95)),
    ]


def train_step(model: LlamaForCausalLM, optimizers: list[Optimizer], tokens: TokenIds, rate: float) -> float:
    """Take one step at `rate` times the peak rates, and return the loss before it, in nats a token."""
    tokens_BT = torch.from_numpy(tokens)
    logits_BTV = model(tokens_BT, use_cache=False).logits
    loss = cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.setdefault("peak_rate", group["lr"])
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def start_circuit(recipe: Recipe) -> LlamaForCausalLM:
    """Build the two blocks of phase 1, with a previous-token head in the first."""
    model = build_model(recipe, n_layers=2)
    start_previous_token_head_(model, recipe)
    return model


def train_circuit_(model: LlamaForCausalLM, recipe: Recipe, rng: np.random.Generator) -> Iterator[tuple[int, float]]:
    """Phase 1: train on repeated tokens, and yield step and loss after each step; the caller may stop early."""
    optimizers = make_optimizers(model, recipe, weight_decay=0.0)
    # At most half a window, so that every sequence holds a full repeat.
    longest = recipe.circuit_batch[1] // 2 - 1
    for step in range(1, recipe.circuit_steps + 1):
        tokens = repeated_tokens(rng, recipe.n_vocab, recipe.circuit_batch, longest)
        yield step, train_step(model, optimizers, tokens, min(1.0, step / recipe.warmup_steps))


def grow(circuit: LlamaForCausalLM, recipe: Recipe) -> LlamaForCausalLM:
    """Return a model with the two trained blocks among new ones whose output projections start at zero."""
    model = build_model(recipe, recipe.n_layers)
    model.model.embed_tokens.load_state_dict(circuit.model.embed_tokens.state_dict())
    model.model.norm.load_state_dict(circuit.model.norm.state_dict())
    for layer, block in enumerate(model.model.layers):
        if layer in recipe.circuit_layers:
            source = circuit.model.layers[recipe.circuit_layers.index(layer)]
            block.load_state_dict(source.state_dict())
        else:
            torch.nn.init.zeros_(block.get_parameter("self_attn.o_proj.weight"))
            torch.nn.init.zeros_(block.get_parameter("mlp.down_proj.weight"))
    return model


def train_on_text_(
    model: LlamaForCausalLM, recipe: Recipe, rng: np.random.Generator, tokens: TokenIds
) -> Iterator[tuple[int, float]]:
    """Phase 2: train on text mixed with repeats, and yield step and loss after each step."""
    optimizers = make_optimizers(model, recipe, recipe.weight_decay)
    for step in range(1, recipe.text_steps + 1):
        shape = recipe.long_batch if step % 4 == 0 else recipe.batch
        left = (1 - step / recipe.text_steps) / (1 - recipe.hold_share)
        rate = min(1.0, step / recipe.warmup_steps, max(0.02, left))
        yield step, train_step(model, optimizers, mixed_batch(rng, recipe, tokens, shape), rate)
