"""Train the small language model that ships with the project, and write its card.

    python scripts/train_model.py --out models/pydoc-1m

On one machine with one thread, the same seed gives the same weights. Training takes about five minutes on one core. It
needs torch 2.9 for the Muon optimizer, and no data beyond Python's own documentation.
"""

import argparse
import hashlib
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import tokenizers
import torch
import transformers
from measure_model import (
    REPEAT_EXAMPLES,
    REPEAT_PERIOD,
    REPEAT_SEED,
    best_score,
    per_byte_perplexity,
    repeat_scores,
    text_loss,
    unigram_loss,
    without_attention,
)
from model_card import write_card
from pydoc_text import END_OF_TEXT_ID, PydocText, TokenIds, encode, read_pydoc_text, train_tokenizer
from tqdm import tqdm
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from two_phase_training import Recipe, grow, start_circuit, train_circuit_, train_on_text_

N_ATTEMPTS = 4
SAMPLE_PROMPT = 'The "for" statement'


@dataclass(frozen=True, kw_only=True)
class Circuit:
    """A finished phase 1.

    Attributes:
        model: The two trained blocks.
        seed: Seed of the attempt that succeeded.
        n_steps: Number of training steps.
    """

    model: LlamaForCausalLM
    seed: int
    n_steps: int


def is_induction(induction: float, second_loss: float) -> bool:
    """Return whether two blocks copy by attending to the token after the last occurrence."""
    return induction > 0.6 and second_loss < 1.5


def is_lag_shifted(induction: float, second_loss: float) -> bool:
    """Return whether two blocks copy in another way, which further training does not change."""
    return induction < 0.2 and second_loss < 2.5


def attempt_circuit(recipe: Recipe, rng: np.random.Generator, seed: int) -> Circuit | None:
    """Run phase 1 from one seed; return None if induction did not form."""
    torch.manual_seed(seed)
    model = start_circuit(recipe)
    steps = train_circuit_(model, recipe, rng)
    with tqdm(steps, total=recipe.circuit_steps, desc=f"repeats, seed {seed}", unit="step") as bar:
        for step, loss in bar:
            if step % 25:
                continue
            scores = repeat_scores(model, n_examples=16, period=24)
            found = (best_score(scores.induction), scores.second_loss)
            bar.set_postfix(loss=f"{loss:.2f}", second=f"{found[1]:.2f}", induction=f"{found[0]:.2f}")
            if is_induction(*found):
                return Circuit(model=model, seed=seed, n_steps=step)
            if is_lag_shifted(*found):
                return None
    return None


def find_circuit(recipe: Recipe, rng: np.random.Generator, seed: int) -> Circuit:
    """Run phase 1 with one seed after another until induction forms.

    Raises:
        RuntimeError: No attempt formed induction heads.
    """
    for attempt_seed in range(seed, seed + 100 * N_ATTEMPTS, 100):
        circuit = attempt_circuit(recipe, rng, attempt_seed)
        if circuit is not None:
            return circuit
    raise RuntimeError(
        f"{N_ATTEMPTS} attempts from seed {seed} formed no induction heads; try another seed with --seed"
    )


def train_text(
    circuit: Circuit, recipe: Recipe, rng: np.random.Generator, train: TokenIds, held_out: TokenIds
) -> LlamaForCausalLM:
    """Run phase 2, and show the held-out loss during training."""
    model = grow(circuit.model, recipe)
    steps = train_on_text_(model, recipe, rng, train)
    with tqdm(steps, total=recipe.text_steps, desc="text", unit="step") as bar:
        for step, loss in bar:
            if step % 100 == 0:
                held_out_loss, _ = text_loss(model, held_out, 128, bos=True)
                induction = best_score(repeat_scores(model, n_examples=8).induction)
                bar.set_postfix(loss=f"{loss:.2f}", held_out=f"{held_out_loss:.3f}", induction=f"{induction:.2f}")
    return model


def held_out_figures(model: LlamaForCausalLM, tokens: TokenIds, n_bytes: int, unigram: float) -> dict[str, Any]:
    """Measure the loss on the held-out text in windows of 128 tokens and of the full context."""
    figures: dict[str, Any] = {"n_tokens": len(tokens), "n_bytes": n_bytes, "unigram_loss": unigram}
    for n_positions in (128, model.config.max_position_embeddings):
        with_bos, n_predicted = text_loss(model, tokens, n_positions, bos=True)
        without_bos, _ = text_loss(model, tokens, n_positions, bos=False)
        figures[f"windows_of_{n_positions}"] = {
            "loss_with_bos": with_bos,
            "loss_without_bos": without_bos,
            "perplexity_per_byte": per_byte_perplexity(with_bos, n_predicted, n_bytes),
        }
    return figures


def repeat_figures(model: LlamaForCausalLM) -> dict[str, Any]:
    """Measure copying, with and without the attention of the layer with the best score."""
    scores = repeat_scores(model)
    layer = int(np.argmax([max(heads) for heads in scores.induction]))
    ablated = repeat_scores(without_attention(model, layer))
    return {
        "period": REPEAT_PERIOD,
        "n_examples": REPEAT_EXAMPLES,
        "seed": REPEAT_SEED,
        **asdict(scores),
        "best_layer": layer,
        "second_loss_without_best_layer": ablated.second_loss,
    }


def sample_text(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> str:
    """Let the model continue a heading, at temperature 0.7."""
    torch.manual_seed(seed)
    prompt = tokenizer(SAMPLE_PROMPT, return_tensors="pt")
    # transformers types generate() with a protocol that its own models do not satisfy.
    tokens_BT = cast("Any", model).generate(**prompt, max_new_tokens=160, do_sample=True, temperature=0.7)
    return str(tokenizer.decode(tokens_BT[0]))


def versions() -> dict[str, str]:
    """Return the versions that determine the weights."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "numpy": np.__version__,
    }


def train(seed: int, recipe: Recipe) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, dict[str, Any]]:
    """Train model and tokenizer on the text of the running Python, and return both and the figures."""
    started = time.process_time()
    text = read_pydoc_text()
    tokenizer = train_tokenizer(text.train, recipe.n_vocab, recipe.n_positions)
    train_tokens, held_out_tokens = encode(tokenizer, text.train), encode(tokenizer, text.held_out)
    rng = np.random.default_rng(seed)
    circuit = find_circuit(recipe, rng, seed)
    model = train_text(circuit, recipe, rng, train_tokens, held_out_tokens)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # untyped in transformers
        bos_token_id=END_OF_TEXT_ID, eos_token_id=END_OF_TEXT_ID, pad_token_id=END_OF_TEXT_ID
    )
    cpu_seconds = time.process_time() - started
    unigram = unigram_loss(train_tokens, held_out_tokens, recipe.n_vocab)
    figures = {
        "seed": seed,
        "circuit_seed": circuit.seed,
        "circuit_steps": circuit.n_steps,
        "cpu_seconds": round(cpu_seconds),
        "n_parameters": model.num_parameters(),
        "recipe": asdict(recipe),
        "versions": versions(),
        "text": text_figures(text, len(train_tokens)),
        "held_out": held_out_figures(model, held_out_tokens, len(text.held_out.encode()), unigram),
        "repeats": repeat_figures(model),
        "sample": sample_text(model, tokenizer, seed),
    }
    return model, tokenizer, figures


def text_figures(text: PydocText, n_tokens: int) -> dict[str, Any]:
    """Describe the text so that it can be recognised; topics differ a little between releases of Python."""
    return {
        "train_sha256": hashlib.sha256(text.train.encode()).hexdigest(),
        "held_out_sha256": hashlib.sha256(text.held_out.encode()).hexdigest(),
        "n_train_bytes": len(text.train.encode()),
        "n_train_tokens": n_tokens,
        "n_chars_dropped": text.n_chars_dropped,
        "held_out_topics": text.held_out_topics,
    }


def main() -> None:
    """Read the command line, train, write, and print the card."""
    parser = argparse.ArgumentParser(description="Train the small language model of the project.")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, report and card")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    model, tokenizer, figures = train(arguments.seed, Recipe())
    card = write_card(figures, SAMPLE_PROMPT)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    (arguments.out / "report.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    (arguments.out / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
