"""The head's backward pass against autograd in float64; vocabulary blocks and candidates against the full matrix."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from residua.analysis.lens.lm_head import LMHead, load_lm_head
from residua.analysis.lens.refine import draw_candidates
from residua.analysis.lens.unembedding import Decoder, Unembedding
from tests.lm_heads import save_lm_head
from tests.models.tiny import TINY

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def by_autograd(head: LMHead, final: Tensor, target: Tensor) -> Tensor:
    leaf = final.clone().requires_grad_()
    kl = (target * (target.log() - head.logits(leaf).log_softmax(-1))).sum()
    return torch.autograd.grad(kl, leaf)[0]


def check_gradient(head: LMHead) -> None:
    final = normal(7, head.width) * 3 + 1
    target = head.logits(normal(7, head.width, seed=1)).softmax(-1)
    decoder = Decoder(head, dtype=DOUBLE)
    torch.testing.assert_close(decoder.logits(final), head.logits(final), rtol=1e-12, atol=1e-12)
    found = decoder.kl_gradient(final, target)
    torch.testing.assert_close(found, by_autograd(head, final, target), rtol=1e-10, atol=1e-12)
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize("name", TINY)
def test_the_gradient_is_autograds_on_every_architecture(name: str, tmp_path: Path) -> None:
    save_lm_head(TINY[name](), tmp_path)
    check_gradient(load_lm_head(tmp_path, dtype=DOUBLE))


@pytest.mark.parametrize("change", [{"logit_scale": 0.3}, {"softcap": 2.0, "logit_scale": 3.0}, {"norm": "layer"}])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_gradient_is_autograds_with_scale_softcap_and_norm(
    name: str, change: dict[str, object], tmp_path: Path
) -> None:
    save_lm_head(TINY[name](), tmp_path)
    head = load_lm_head(tmp_path, dtype=DOUBLE)
    check_gradient(LMHead(replace(head.spec, **change), head.parameters))  # type: ignore[arg-type]  # any field


def test_normalise_applies_the_final_norm_without_parameters(tmp_path: Path) -> None:
    final = normal(5, 32) * 7 + 2
    save_lm_head(TINY["llama"](), tmp_path)
    normalised = Decoder(load_lm_head(tmp_path, dtype=DOUBLE), dtype=DOUBLE).normalise(final)
    torch.testing.assert_close(normalised.square().mean(-1), torch.ones(5, dtype=DOUBLE), rtol=1e-5, atol=0)
    torch.testing.assert_close(normalised / normalised[:, :1], final / final[:, :1])
    save_lm_head(TINY["gpt2"](), tmp_path)
    normalised = Decoder(load_lm_head(tmp_path, dtype=DOUBLE), dtype=DOUBLE).normalise(final)
    torch.testing.assert_close(normalised.mean(-1), torch.zeros(5, dtype=DOUBLE))
    torch.testing.assert_close(normalised.var(-1, correction=0), torch.ones(5, dtype=DOUBLE), rtol=1e-5, atol=0)


def test_a_large_unembedding_is_converted_block_by_block() -> None:
    """The last block is short. Both directions equal those of the full matrix."""
    weight, bias = normal(103, 8).bfloat16(), normal(103, seed=1).bfloat16()
    full = Unembedding(weight, bias, scale=0.5, softcap=3.0)
    blocks = Unembedding(weight, bias, scale=0.5, softcap=3.0, most_bytes=103 * 8 * 4 - 1, block_bytes=10 * 8 * 4)
    assert full.is_converted
    assert not blocks.is_converted
    hidden, gradient = normal(6, 8, seed=2).float(), normal(6, 103, seed=3).float()
    logits = blocks.logits(hidden)
    torch.testing.assert_close(logits, full.logits(hidden))
    torch.testing.assert_close(blocks.backward(gradient.clone(), logits), full.backward(gradient.clone(), logits))
    tokens = torch.tensor([102, 3, 3])
    torch.testing.assert_close(blocks.of_tokens(tokens).logits(hidden), logits[:, tokens])


def test_candidates_give_the_gradient_on_average(tmp_path: Path) -> None:
    """Over many draws the mean is the exact gradient, but for a bias far below one draw's noise."""
    save_lm_head(TINY["llama"](), tmp_path)
    head = load_lm_head(tmp_path, dtype=DOUBLE)
    decoder, final = Decoder(head, dtype=DOUBLE), normal(16, 32)
    target = head.logits(normal(16, 32, seed=1) / 3).softmax(-1)
    exact = decoder.kl_gradient(final, target)
    generator = torch.Generator().manual_seed(2)
    draws = []
    for _ in range(600):
        candidates = draw_candidates(target, 16, generator)
        assert candidates is not None
        some = decoder.unembedding.of_tokens(candidates.tokens)
        draws.append(
            decoder.kl_gradient(
                final, candidates.restrict(target), unembedding=some, log_weights=candidates.weights.log()
            )
        )
    noise = torch.stack([(draw - exact).norm() for draw in draws]).mean()
    assert (torch.stack(draws).mean(0) - exact).norm() < 0.25 * noise
    assert torch.cosine_similarity(torch.stack(draws).mean(0).flatten(), exact.flatten(), 0) > 0.97


def test_candidates_hold_the_most_probable_tokens_once_and_the_rest_by_weight() -> None:
    target = normal(32, 97).softmax(-1)
    drawn = draw_candidates(target, 10, torch.Generator().manual_seed(0))
    assert drawn is not None
    best = target.mean(0).topk(10).indices
    assert drawn.tokens[:10].tolist() == best.tolist()
    assert drawn.weights[:10].tolist() == [1.0] * 10
    assert not set(drawn.tokens[10:].tolist()) & set(best.tolist())
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(97, dtype=DOUBLE)
    for _ in range(3000):
        again = draw_candidates(target, 10, generator)
        assert again is not None
        counts.index_add_(0, again.tokens, again.weights)
    torch.testing.assert_close(counts / 3000, torch.ones(97, dtype=DOUBLE), rtol=0, atol=0.35)
    assert draw_candidates(target, 49, generator) is None
