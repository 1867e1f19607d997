"""The head detector, compared with TransformerLens's definition in full matrices, as it is published there."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import residua
from residua.analysis.attention.head_detector import HeadName
from residua.store.base.errors import AnalysisError
from residua.store.read.archive import Archive
from tests.models.tiny import LAYERS, TINY

EXAMPLES = [[1, 5, 9, 5, 6, 9, 5, 9, 9, 7, 5, 6], [1, 8, 8, 3, 1, 8, 3, 3]]
NAMES: tuple[HeadName, ...] = ("previous_token_head", "duplicate_token_head", "induction_head")


def detection_pattern(name: str, ids: list[int]) -> torch.Tensor:
    """TransformerLens 4.3, ``get_*_head_detection_pattern``."""
    n = len(ids)
    if name == "previous_token_head":
        pattern = torch.zeros(n, n)
        pattern[1:, :-1] = torch.eye(n - 1)
        return pattern
    rows = torch.tensor(ids).repeat(n, 1)
    duplicates = torch.tril((rows == rows.T).float().fill_diagonal_(0))
    if name == "duplicate_token_head":
        return duplicates
    return torch.tril(torch.cat((torch.zeros(n, 1), torch.roll(duplicates, 1, 1)[:, 1:]), dim=1))


def similarity(attention: torch.Tensor, detection: torch.Tensor, *, bos: bool, current: bool, measure: str) -> float:
    """TransformerLens 4.3, ``compute_head_attention_similarity_score``."""
    compared = attention.clone() if measure == "mul" else (attention - detection).abs()
    if bos:
        compared[:, 0] = 0
    if current:
        compared.fill_diagonal_(0)
    if measure == "mul":
        return ((compared * detection).sum() / compared.sum()).item()
    return 1 - round((compared.mean() * len(compared)).item(), 3)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    out = tmp_path_factory.mktemp("heads") / "a.zarr"
    return residua.capture_dataset(TINY["llama"](), EXAMPLES, sites="pattern.*,q.*,k.*", out=out).archive


@pytest.mark.parametrize("measure", ["mul", "abs"])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_transformer_lens_definition(name: HeadName, measure: str, archive: Archive) -> None:
    for bos, current in product([False, True], repeat=2):
        scores = np.zeros((LAYERS, 4))
        for number, ids in enumerate(EXAMPLES):
            detection = detection_pattern(name, ids).double()
            for layer, stored in enumerate(archive.example(number, "pattern.*").values()):
                for head in range(4):
                    attention = torch.from_numpy(stored[:, head, : len(ids)].astype(np.float64))
                    score = similarity(attention, detection, bos=bos, current=current, measure=measure)
                    scores[layer, head] += score / len(EXAMPLES)
        options: dict[str, Any] = {"exclude_bos": bos, "exclude_current_token": current, "error_measure": measure}
        table = residua.analysis.head_detector(archive, name, **options)
        assert table.column("layer").to_pylist() == [0] * 4 + [1] * 4 + [2] * 4
        assert table.column("head").to_pylist() == [0, 1, 2, 3] * LAYERS
        np.testing.assert_allclose(table.column("score").to_numpy(), scores.ravel(), rtol=1e-12, atol=1e-12)
        close = residua.analysis.head_detector(archive, name, source="qk", **options).column("score").to_numpy()
        assert np.abs(close - scores.ravel()).max() < (1e-6 if measure == "mul" else 1.1e-3)  # abs has three digits


def test_it_is_transformer_lens_own_function(archive: Archive) -> None:
    detector = pytest.importorskip("transformer_lens.head_detector", reason="TransformerLens is not installed here")
    for name, measure in product(NAMES, ("mul", "abs")):
        scores = np.zeros((LAYERS, 4))
        for number, ids in enumerate(EXAMPLES):
            detection = getattr(detector, f"get_{name}_detection_pattern")(torch.tensor([ids]))
            for layer, stored in enumerate(archive.example(number, "pattern.*").values()):
                for head in range(4):
                    scores[layer, head] += detector.compute_head_attention_similarity_score(
                        torch.from_numpy(stored[:, head, : len(ids)].astype(np.float64)),
                        detection_pattern=detection,
                        exclude_bos=False,
                        exclude_current_token=False,
                        error_measure=measure,
                    )
        options: dict[str, Any] = {"error_measure": measure}
        table = residua.analysis.head_detector(archive, name, **options)
        found = table.column("score").to_numpy()
        np.testing.assert_allclose(found, scores.ravel() / len(EXAMPLES), rtol=1e-12, atol=1e-12)


def test_full_patterns_are_needed(tmp_path: Path) -> None:
    some = residua.capture_dataset(
        TINY["llama"](), EXAMPLES, sites="pattern.0", positions="last", out=tmp_path / "a.zarr"
    ).archive
    with pytest.raises(AnalysisError, match=r"example 0 of .* 1 of its 12 positions.* all positions"):
        residua.analysis.head_detector(some, "previous_token_head", error_measure="abs")


def test_other_names_are_refused(archive: Archive) -> None:
    wrong: list[dict[str, Any]] = [
        {"detection_pattern": "copying_head"},
        {"detection_pattern": "induction_head", "error_measure": "square"},
    ]
    for options in wrong:
        with pytest.raises(AnalysisError, match=r"copying_head.*induction_head|square.*mul"):
            residua.analysis.head_detector(archive, **options)
