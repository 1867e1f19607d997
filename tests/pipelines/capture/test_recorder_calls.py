"""Calls as users make them: masks by position, tensors as columns, scalars a token, and calls that fail midway."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import residua
from residua.store.base.errors import CaptureError
from tests.models import TINY

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 3, 3]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return TINY["llama"]()


def test_a_mask_passed_by_position_counts(model: PreTrainedModel, tmp_path: Path) -> None:
    with residua.Recorder(model, sites="resid_post.0", out=tmp_path / "a.zarr") as recorder, torch.no_grad():
        recorder.annotate(columns={"label": torch.tensor([7, 8])})
        model(IDS, MASK)
    archive = residua.open(tmp_path / "a.zarr")
    assert archive.rows.token[...].tolist() == [5, 6, 7, 8, 9, 10]
    assert archive.examples.column("label").to_pylist() == [7, 8]


class Scorer(nn.Module):
    """Gives one number a token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 4)
        self.inner = nn.Identity()
        self.fails = False

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.fails:
            raise RuntimeError("out of memory")
        scores: torch.Tensor = self.inner(self.table(input_ids).sum(-1))
        return scores


@pytest.mark.parametrize("rows_per_shard", [1, 2, 64])
def test_a_scalar_a_token_is_a_row_of_width_one(tmp_path: Path, rows_per_shard: int) -> None:
    model = Scorer()
    out = tmp_path / "a.zarr"
    with (
        residua.Recorder(model, sites="module:inner@output", out=out, rows_per_shard=rows_per_shard),
        torch.no_grad(),
    ):
        expected = torch.cat([model(IDS).flatten(), model(IDS[:1]).flatten()])
    stored = residua.open(out)["module:inner@output"][...]
    assert np.array_equal(stored, expected.numpy()[:, None])


def test_a_call_that_failed_and_was_swallowed_ends_in_an_error_and_no_sealed_archive(tmp_path: Path) -> None:
    model = Scorer()
    out = tmp_path / "a.zarr"

    def record() -> None:
        with residua.Recorder(model, sites="module:inner@output", out=out, rows_per_shard=8), torch.no_grad():
            model(IDS)
            model.fails = True
            with pytest.raises(RuntimeError, match="out of memory"):
                model(IDS)

    with pytest.raises(CaptureError, match="ended before its 8 rows were copied"):
        record()
    archive = residua.open(out)
    assert not archive.is_sealed
    assert archive.progress.rows == 8, "what the first call filled is safe"
