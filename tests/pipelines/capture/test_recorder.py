"""A recorder in the user's own loop: rows follow the calls, masks are respected, the archive is sealed at the end."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import residua
from residua.store.base.errors import CaptureError, PlanError, UnknownSiteError
from tests.models.tiny import TINY, VOCABULARY
from tests.plain_zarr import plain_array

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 3, 3]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return TINY["llama"]()


def calls(side: str) -> list[dict[str, torch.Tensor]]:
    """Return three calls of ragged examples, padded on `side`."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for lengths in ([5, 9, 2], [7, 7], [1, 12]):
        ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
        mask = torch.zeros_like(ids)
        for b, length in enumerate(lengths):
            mask[b, slice(0, length) if side == "right" else slice(-length, None)] = 1
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        made.append({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    return made


def hidden(model: PreTrainedModel, call: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    with torch.no_grad():
        output = model(**call, output_hidden_states=True, use_cache=False)
    states: torch.Tensor = output.hidden_states[layer]
    return states[call["attention_mask"].bool()]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows_per_shard", [8, 16, 1024])
def test_rows_follow_the_calls(model: PreTrainedModel, side: str, rows_per_shard: int, tmp_path: Path) -> None:
    batches = calls(side)
    out = tmp_path / "a.zarr"
    if rows_per_shard == 8:
        batches = [{name: value[b : b + 1] for name, value in call.items()} for call in batches for b in range(2)]
    with residua.Recorder(model, sites="resid_pre.1,resid_pre.2", out=out, rows_per_shard=rows_per_shard) as recorder:
        for number, call in enumerate(batches):
            recorder.annotate(columns={"call": [number] * len(call["input_ids"])})
            with torch.no_grad():
                model(**call, use_cache=False)
    archive = residua.open(out)
    assert archive.is_sealed
    for layer in (1, 2):
        expected = torch.cat([hidden(model, call, layer) for call in batches])
        assert torch.equal(archive[f"resid_pre.{layer}"].torch(), expected)
        assert np.array_equal(plain_array(out, f"sites/resid_pre/{layer}"), expected.numpy())
    tokens = torch.cat([call["input_ids"][call["attention_mask"].bool()] for call in batches])
    assert archive.rows.token[...].tolist() == tokens.tolist()
    numbers = [n for n, call in enumerate(batches) for _ in call["input_ids"]]
    assert archive.examples.column("call").to_pylist() == numbers
    assert residua.verify(out).is_sound


def test_keep_chooses_positions(model: PreTrainedModel, tmp_path: Path) -> None:
    call = calls("left")[0]
    keep = torch.zeros_like(call["input_ids"]).bool()
    keep[:, -1] = True
    with residua.Recorder(model, sites="resid_pre.1", out=tmp_path / "a.zarr") as recorder, torch.no_grad():
        recorder.annotate(keep=keep)
        model(**call)
        model(**call)
    archive = residua.open(tmp_path / "a.zarr")
    last = [4, 8, 1]
    everything = [[0, 1, 2, 3, 4], list(range(9)), [0, 1]]
    assert archive.rows.position[...].tolist() == last + [p for ps in everything for p in ps], "keep is for one call"


def test_patterns_are_by_token_whatever_the_padding(model: PreTrainedModel, tmp_path: Path) -> None:
    found = {}
    for side in ("left", "right"):
        out = tmp_path / f"{side}.zarr"
        ids = calls("right")
        with residua.Recorder(model, sites="pattern.1", out=out, max_length=16), torch.no_grad():
            for call in ids:
                model(**(call if side == "right" else shifted(call)))
        found[side] = residua.open(out)["pattern.1"][...]
    assert found["left"].shape == (43, 4, 16)
    assert np.allclose(found["left"], found["right"], atol=1e-6)
    assert np.allclose(found["right"].sum(-1), 1, atol=1e-5)


def shifted(call: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a right-padded call padded on the left."""
    lengths = call["attention_mask"].sum(-1).tolist()
    width = call["input_ids"].shape[1]
    moved = {name: value.clone() for name, value in call.items()}
    for b, length in enumerate(lengths):
        for value in moved.values():
            value[b] = torch.roll(value[b], width - length)
    return moved


def test_bad_calls_are_errors_that_say_what_to_do(model: PreTrainedModel, tmp_path: Path) -> None:
    call = calls("right")[0]
    with pytest.raises(UnknownSiteError, match="resid_pots"):
        residua.Recorder(model, sites="resid_pots.0", out=tmp_path / "a.zarr")
    with (
        pytest.raises(CaptureError, match="not called"),
        residua.Recorder(model, sites="embed", out=tmp_path / "a.zarr"),
    ):
        pass
    with (
        pytest.raises(PlanError, match="max_length"),
        residua.Recorder(model, sites="pattern.0", out=tmp_path / "b.zarr"),
    ):
        model(**call)
    with residua.Recorder(model, sites="embed", out=tmp_path / "c.zarr") as recorder:
        model(**call)
        recorder.annotate(columns={"label": [1]})
        with pytest.raises(CaptureError, match="label"):
            model(**call)
        recorder.annotate()
        with pytest.raises(CaptureError, match="attention_mask"):
            model(input_ids=call["input_ids"], attention_mask=torch.ones(3, 20))
    with pytest.raises(FileExistsError, match="exists"):
        residua.Recorder(model, sites="embed", out=tmp_path / "c.zarr")


class Vision(nn.Module):
    """A convolution and a head; rows are whole images."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Classify images, (images, 3, height, width)."""
        features: torch.Tensor = self.features(images)
        logits: torch.Tensor = self.head(features.mean((-1, -2)))
        return logits


def test_any_module_of_a_model_without_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Vision(), torch.randn(6, 3, 8, 8)
    sites = ["module:features@output", "module:head@input"]
    with residua.Recorder(model, sites=sites, out=tmp_path / "a.zarr") as recorder, torch.no_grad():
        for half in (images[:4], images[4:]):
            recorder.annotate(columns={"label": ["cat"] * len(half)})
            model(half)
    archive = residua.open(tmp_path / "a.zarr")
    with torch.no_grad():
        features = model.features(images)
    assert archive["module:features@output"].shape == (6, 4, 6, 6)
    assert torch.allclose(archive["module:features@output"].torch(), features, atol=1e-6)
    assert archive.examples.column("label").to_pylist() == ["cat"] * 6
    assert residua.verify(tmp_path / "a.zarr").is_sound


def test_embeddings_with_a_mask_leave_padding_out(model: PreTrainedModel, tmp_path: Path) -> None:
    embedded = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    with residua.Recorder(model, sites="resid_post.1", out=tmp_path / "a.zarr"), torch.no_grad():
        model(inputs_embeds=embedded, attention_mask=mask)
    archive = residua.open(tmp_path / "a.zarr")
    with torch.no_grad():
        output = model(inputs_embeds=embedded, attention_mask=mask, output_hidden_states=True)
    assert torch.equal(archive["resid_post.1"].torch(), output.hidden_states[2][mask.bool()])


def test_settings_that_cannot_be_stored_are_refused_before_the_model_runs(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    settings: list[dict[str, Any]] = [{"codec": "zip"}, {"dtype": "int3"}, {"rows_per_shard": 3}, {"threads": 0}]
    for wrong in settings:
        with pytest.raises(PlanError, match=str(next(iter(wrong.values())))):
            residua.Recorder(model, sites="embed", out=tmp_path / "a.zarr", **wrong)


def test_a_mask_passed_by_position_counts(model: PreTrainedModel, tmp_path: Path) -> None:
    with residua.Recorder(model, sites="resid_post.0", out=tmp_path / "a.zarr") as recorder, torch.no_grad():
        recorder.annotate(columns={"label": torch.tensor([7, 8])})
        model(IDS, MASK)
    archive = residua.open(tmp_path / "a.zarr")
    assert archive.rows.token[...].tolist() == [5, 6, 7, 8, 9, 10]
    assert archive.examples.column("label").to_pylist() == [7, 8]


class Scorer(nn.Module):
    """Gives one number per token."""

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


def test_an_error_of_the_loop_says_that_a_shard_could_not_be_written_either(tmp_path: Path) -> None:
    model, out = Scorer(), tmp_path / "a.zarr"

    def record() -> None:
        with residua.Recorder(model, sites="module:inner@output", out=out, rows_per_shard=16), torch.no_grad():
            model(IDS)
            out.rename(tmp_path / "elsewhere.zarr")
            model(IDS)  # fills the shard; its writer finds no archive
            raise ValueError("stopped by the user's loop")

    with pytest.raises(ValueError, match="stopped") as caught:
        record()
    (note,) = caught.value.__notes__
    assert "could not be written" in note
    assert str(out) in note
    assert "moved or removed" in note
