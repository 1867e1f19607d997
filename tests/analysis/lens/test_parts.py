"""Lenses of a decoder, and of the text model beside a vision tower: they end in the logits of plain calls."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import residua
from residua.pipelines.cli.main import main
from residua.store.base.errors import AnalysisError
from tests.models.tiny_multimodal import MULTIMODAL
from tests.models.tiny_pairs import N_DECODER, TINY_PAIRS, VOCABULARY

_RNG = np.random.default_rng(3)
PAIRS: list[dict[str, Any]] = [
    {"input_ids": _RNG.integers(3, VOCABULARY, 9).tolist(), "labels": _RNG.integers(3, VOCABULARY, 12).tolist()}
    for _ in range(24)
]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_lens_of_a_decoder_ends_in_its_logits(name: str, tmp_path: Path) -> None:
    model = TINY_PAIRS[name]()
    archive = residua.capture_dataset(
        model, PAIRS, out=tmp_path / "a.zarr", sites="resid_post.*,decoder.logits"
    ).archive
    lens = residua.TunedLens.fit(archive, refine=False)
    assert sorted(lens.translators) == list(range(1, N_DECODER))
    last = f"decoder.resid_post.{N_DECODER - 1}"
    with torch.no_grad():
        logits = model(**{key: torch.tensor([value]) for key, value in PAIRS[5].items()}).logits[0]
    rows = torch.as_tensor(archive.stacks["decoder"].example(5, last)[last])
    torch.testing.assert_close(lens.decode(last, rows), logits, atol=1e-3, rtol=1e-3)
    assert lens.report is not None
    assert lens.report["site"].to_pylist() == [f"decoder.resid_post.{layer}" for layer in range(N_DECODER - 1)]
    if name == "t5":
        words = ["lens", "train", str(tmp_path / "a.zarr"), "--out", str(tmp_path / "lens"), "--no-refine"]
        assert main(words) == 0
        assert "decoder.resid_post.0" in (tmp_path / "lens" / "report.parquet").read_bytes().decode("latin-1")
    with pytest.raises(AnalysisError, match=r"LM head.*decoder"):
        residua.TunedLens.fit(archive.stacks["encoder"])


def test_a_lens_of_a_text_model_ends_in_its_logits(tmp_path: Path) -> None:
    model, _ = MULTIMODAL["gemma3"]()
    texts = [_RNG.integers(20, 40, 12).tolist() for _ in range(24)]
    archive = residua.capture_dataset(model, texts, out=tmp_path / "a.zarr", sites="resid_post.*").archive
    lens = residua.TunedLens.fit(archive, refine=False)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([texts[2]])).logits[0]
    rows = torch.as_tensor(archive.example(2, "resid_post.2")["resid_post.2"])
    torch.testing.assert_close(lens.decode("resid_post.2", rows), logits, atol=1e-3, rtol=1e-3)
