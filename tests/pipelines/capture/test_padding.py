"""Captures and replays of models whose rows padding changes: examples run one by one, and a note says so."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import residua
from residua.capture.identity.padding import RAN_ALONE
from residua.pipelines.capture.reproduce import reproduce
from residua.store.base.errors import PlanError
from residua.store.read.summary import summarise
from tests.capture.leaking_models import LEAKING, module_values
from tests.models.tiny import TINY, VOCABULARY

LENGTHS = (3, 17, 9, 9)
SITE = {
    "fnet": "fnet.encoder.layer.1",
    "convbert": "convbert.encoder.layer.1",
    "mobilebert": "mobilebert.encoder.layer.1",
    "averaged": "layers.1",
}


def tokens(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, VOCABULARY, length).tolist() for length in lengths]


def captured(model: PreTrainedModel, out: Path, data: Any = None, **options: Any) -> Any:
    settings: dict[str, Any] = {"codec": "raw", "head": False, "sites": "resid_post.*,logits", **options}
    return residua.capture_dataset(model, tokens() if data is None else data, out=out, **settings)


@pytest.mark.parametrize("name", LEAKING)
def test_rows_are_those_of_each_example_alone(name: str, tmp_path: Path) -> None:
    model = LEAKING[name]()
    result = captured(model, tmp_path / "a.zarr", sites=f"module:{SITE[name]}@output,logits")
    for number, ids in enumerate(tokens()):
        found = result.archive.example(number)[f"module:{SITE[name]}@output"]
        np.testing.assert_array_equal(found, module_values(model, SITE[name], ids).numpy())
    assert RAN_ALONE in result.notes
    assert RAN_ALONE in result.archive.provenance["notes"]
    assert RAN_ALONE in summarise(result.archive).notes
    assert result.archive.plan.batch_tokens == 1


def test_examples_of_one_length_run_together(tmp_path: Path) -> None:
    result = captured(LEAKING["fnet"](), tmp_path / "a.zarr", tokens((9, 9, 9)), batch_tokens=27)
    assert result.archive.plan.batch_tokens == 27
    assert RAN_ALONE not in result.notes


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "bert"])
def test_models_that_keep_to_the_mask_run_in_batches(name: str, tmp_path: Path) -> None:
    result = captured(TINY[name](), tmp_path / "a.zarr", batch_tokens=50)
    assert result.archive.plan.batch_tokens == 50
    assert RAN_ALONE not in result.notes


@pytest.mark.parametrize("name", LEAKING)
def test_a_replay_equals_the_capture_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = LEAKING[name]()
    archive = captured(model, tmp_path / "a.zarr").archive
    for at in (None, "resid_post.0"):
        for examples in ([0, 1, 2], [2, 3]):
            with residua.replay(model, archive, examples=examples, at=at, keep=["resid_post.1"]) as run:
                assert run.notes == (RAN_ALONE,)
                for number, logits, rows in zip(examples, run.logits, run["resid_post.1"], strict=True):
                    np.testing.assert_array_equal(logits.numpy(), archive.example(number)["logits"])
                    np.testing.assert_array_equal(rows.numpy(), archive.example(number)["resid_post.1"])


def test_a_captured_replay_runs_examples_one_by_one(tmp_path: Path) -> None:
    model = LEAKING["convbert"]()
    archive = captured(model, tmp_path / "a.zarr").archive
    found = residua.replay_dataset(model, archive, out=tmp_path / "r", at="resid_post.0", capture="resid_post.2")
    assert RAN_ALONE in found.notes
    assert found.archive is not None
    for number in range(len(LENGTHS)):
        np.testing.assert_array_equal(
            found.archive.example(number)["resid_post.2"], archive.example(number)["resid_post.2"]
        )


def test_gradients_of_several_lengths_are_refused_before_the_replay(tmp_path: Path) -> None:
    model = LEAKING["averaged"]()
    archive = captured(model, tmp_path / "a.zarr").archive
    with (
        pytest.raises(PlanError, match="one example at a time"),
        residua.replay(model, archive, examples=[0, 1], grad=True) as run,
    ):
        assert run.logits
    metric = {"logit_difference": [4, 5], "position": -1}  # the model sees later tokens, so it has no loss
    with residua.replay(model, archive, examples=[2, 3], grad=True) as run:
        assert [len(rows) for rows in run.gradients(metric)["embed"]] == [9, 9]


def test_generation_continues_prompts_one_by_one(tmp_path: Path) -> None:
    model: Any = LEAKING["averaged"]()
    archive = captured(model, tmp_path / "a.zarr").archive
    options: dict[str, Any] = {"max_new_tokens": 5, "use_cache": False}
    with residua.replay(model, archive, examples=[0, 1, 2]) as run:
        found = run.generate(**options)
    for ids, new in zip(tokens(), found, strict=False):
        alone = model.generate(torch.tensor([ids]), do_sample=False, **options)
        assert new == alone[0, len(ids) :].tolist()


def test_a_capture_is_resumed_and_reproduced(tmp_path: Path) -> None:
    model = LEAKING["fnet"]()
    captured(model, tmp_path / "a.zarr")
    again = captured(model, tmp_path / "a.zarr")
    assert again.resumed
    assert RAN_ALONE in again.notes
    found = reproduce(model, tmp_path / "a.zarr", n_batches=4)
    assert found.is_exact
    assert found.n_batches == len(LENGTHS)
