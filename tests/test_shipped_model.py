"""The shipped model is what its card says: a language model of its text with induction heads.

These tests use no training script. They compute losses from the logits in float64, the unigram baseline from counts,
and head scores from eager attention on random tokens with another seed than the card's.
"""

import hashlib
import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parents[1] / "models" / "pydoc-1m"
BOS = 0
PERIOD = 40

Floats = npt.NDArray[np.float64]
TokenIds = npt.NDArray[np.int64]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((FOLDER / "report.json").read_text())
    return figures


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation="eager")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def held_out_text(report: dict[str, Any]) -> str:
    names = report["text"]["held_out_topics"]
    return "\n\n".join(topics[name] for name in names if name in topics)


@pytest.fixture(scope="module")
def train_text(report: dict[str, Any], held_out_text: str) -> str:
    names = [name for name in sorted(topics) if name not in report["text"]["held_out_topics"]]
    paragraphs = "\n\n".join(topics[name] for name in names).split("\n\n")
    return "\n\n".join(p for p in paragraphs if p not in held_out_text.split("\n\n"))


@pytest.fixture(scope="module")
def tolerance(report: dict[str, Any], train_text: str, held_out_text: str) -> float:
    """Return the allowed difference to the card's losses, in nats a token; the text differs between Pythons."""
    same = [
        hashlib.sha256(text.encode()).hexdigest() == report["text"][f"{name}_sha256"]
        for name, text in (("train", train_text), ("held_out", held_out_text))
    ]
    return 1e-3 if all(same) else 0.3


@pytest.fixture(scope="module")
def held_out(tokenizer: Any, held_out_text: str) -> TokenIds:
    return np.array(tokenizer.encode(held_out_text))


@pytest.fixture(scope="module")
def repeats(model: Any) -> tuple[Floats, list[Floats]]:
    """Return losses (examples, tokens) and patterns (examples, heads, query, key) on the repeated tokens."""
    tokens_BT = repeated_tokens()
    with torch.no_grad():
        output = model(torch.from_numpy(tokens_BT), output_attentions=True)
    patterns = [pattern_BHQK.double().numpy() for pattern_BHQK in output.attentions]
    return losses(output.logits, tokens_BT), patterns


def repeated_tokens() -> TokenIds:
    """Return BOS and then a random block twice, (24, 1 + 2 periods)."""
    block = np.random.default_rng(7).integers(1, 1024, (24, PERIOD))
    return np.concatenate([np.full((24, 1), BOS), block, block], axis=1)


def losses(logits_BTV: torch.Tensor, tokens_BT: TokenIds) -> Floats:
    """Return the cross-entropy in float64, (examples, tokens - 1)."""
    scores: Floats = logits_BTV.double().numpy()[:, :-1]
    highest = scores.max(-1, keepdims=True)
    log_total = highest[..., 0] + np.log(np.exp(scores - highest).sum(-1))
    target = np.take_along_axis(scores, tokens_BT[:, 1:, None], axis=-1)[..., 0]
    result: Floats = log_total - target
    return result


def total_loss(model: Any, tokens: TokenIds, n_positions: int, *, bos: bool) -> tuple[float, int]:
    """Return the total loss and the number of predicted tokens, over consecutive windows of a text."""
    total, n_predicted, start = 0.0, 0, 0
    while start < len(tokens) - 1:
        stop = start + n_positions - bos
        window = np.concatenate([[BOS] * bos, tokens[start:stop]]).astype(np.int64)[None]
        with torch.no_grad():
            window_losses = losses(model(torch.from_numpy(window)).logits, window)
        total, n_predicted, start = total + window_losses.sum(), n_predicted + window_losses.size, stop
    return total, n_predicted


def stripe(patterns: list[Floats], distance: int) -> Floats:
    """Return the mean attention, (layers, heads), from the second copy to the token `distance` before."""
    queries = np.arange(PERIOD + 1, 2 * PERIOD + 1)
    return np.array([p[:, :, queries, queries - distance].mean((0, 2)) for p in patterns])


def test_the_folder_is_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(sizes.values()) < 5_000_000
    assert set(sizes) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_it_has_the_architecture_that_the_card_names(model: Any, report: dict[str, Any]) -> None:
    config = model.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 6, 128)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert (config.vocab_size, config.max_position_embeddings) == (1024, 512)
    assert config.attention_bias
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == report["n_parameters"]


def test_decoding_returns_every_text_unchanged(tokenizer: Any, held_out_text: str) -> None:
    odd = " two  spaces , before ' punctuation .\n\n\ttab \r\n naïve 日本語 🙂 \x00"
    for text in (held_out_text, odd):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.bos_token_id] == [tokenizer.eos_token_id] == [BOS]
    assert len(tokenizer) == 1024


@pytest.mark.parametrize("n_positions", [128, 512])
def test_it_predicts_held_out_text_as_well_as_the_card_says(
    model: Any,
    report: dict[str, Any],
    held_out: TokenIds,
    held_out_text: str,
    tolerance: float,
    n_positions: int,
) -> None:
    stated = report["held_out"][f"windows_of_{n_positions}"]
    with_bos, n_with = total_loss(model, held_out, n_positions, bos=True)
    without_bos, n_without = total_loss(model, held_out, n_positions, bos=False)
    assert n_with == len(held_out)
    assert with_bos / n_with < 3.6
    assert without_bos / n_without < 3.6
    assert with_bos / n_with == pytest.approx(stated["loss_with_bos"], abs=tolerance)
    assert without_bos / n_without == pytest.approx(stated["loss_without_bos"], abs=tolerance)
    per_byte = np.exp(with_bos / len(held_out_text.encode()))
    assert np.log(per_byte) == pytest.approx(np.log(stated["perplexity_per_byte"]), abs=tolerance)


def test_it_beats_guessing_by_frequency(
    model: Any,
    tokenizer: Any,
    report: dict[str, Any],
    train_text: str,
    held_out: TokenIds,
    tolerance: float,
) -> None:
    counts = np.bincount(tokenizer.encode(train_text), minlength=1024) + 1
    unigram = float(-np.log(counts[held_out] / counts.sum()).mean())
    total, n_predicted = total_loss(model, held_out, 512, bos=True)
    assert unigram == pytest.approx(report["held_out"]["unigram_loss"], abs=tolerance)
    assert total / n_predicted < unigram - 2.0


def test_it_copies_repeated_text(repeats: tuple[Floats, list[Floats]], report: dict[str, Any]) -> None:
    losses_BT, _ = repeats
    # Without the first token of the second copy: nothing predicts that a second copy begins.
    first, second = losses_BT[:, :PERIOD].mean(), losses_BT[:, PERIOD + 1 :].mean()
    assert first > np.log(1024) - 0.5
    assert second < 0.1 * first
    assert first == pytest.approx(report["repeats"]["first_loss"], abs=0.2)
    assert second == pytest.approx(report["repeats"]["second_loss"], abs=0.2)


def test_a_few_heads_are_induction_heads_and_most_are_not(
    repeats: tuple[Floats, list[Floats]], report: dict[str, Any]
) -> None:
    scores = stripe(repeats[1], PERIOD - 1)
    assert scores.shape == (6, 4)
    assert scores.max() > 0.5
    assert (scores < 0.1).mean() >= 0.75
    np.testing.assert_allclose(scores, report["repeats"]["induction"], atol=0.05)
    np.testing.assert_allclose(stripe(repeats[1], 1), report["repeats"]["previous_token"], atol=0.05)


def test_copying_needs_those_heads(model: Any, report: dict[str, Any]) -> None:
    """Without the attention of the induction heads' layer, the second copy has the loss of the first."""
    tokens_BT = repeated_tokens()
    attention = model.model.layers[report["repeats"]["best_layer"]].self_attn
    handle = attention.o_proj.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    try:
        with torch.no_grad():
            second = losses(model(torch.from_numpy(tokens_BT)).logits, tokens_BT)[:, PERIOD + 1 :].mean()
    finally:
        handle.remove()
    assert second == pytest.approx(report["repeats"]["second_loss_without_best_layer"], abs=0.3)
    assert second > np.log(1024) - 0.5


def test_its_output_has_the_words_of_its_text(model: Any, tokenizer: Any, train_text: str) -> None:
    torch.manual_seed(0)
    prompt = tokenizer('The "for" statement', return_tensors="pt")
    tokens_BT = model.generate(**prompt, max_new_tokens=120, do_sample=True, temperature=0.7)
    words = tokenizer.decode(tokens_BT[0]).split()
    known = set(train_text.split())
    assert np.mean([word in known for word in words]) > 0.7


def test_the_card_quotes_the_report(report: dict[str, Any]) -> None:
    card = (FOLDER / "README.md").read_text()
    long_window = report["held_out"]["windows_of_512"]
    assert f"| 512 | {long_window['loss_with_bos']:.3f} | {long_window['loss_without_bos']:.3f} |" in card
    for layer, heads in enumerate(report["repeats"]["induction"]):
        assert f"| {layer} | {' | '.join(f'{score:.2f}' for score in heads)} |" in card
    assert report["sample"] in card
