"""Scores of heads, compared with the model's eager attention and with definitions written out query by query."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import residua
from residua.analysis.attention.induction import induction_scores
from residua.store.base.errors import AnalysisError, NotCapturedError
from residua.store.read.archive import Archive
from tests.analysis.backwards import Backwards
from tests.analysis.reference_scores import NAMES, Floats, reference_scores
from tests.models.tiny import LAYERS, TINY, VOCABULARY, gpt_oss, with_mild_attention
from tests.stopped import take_back

BOS = 1
PERIODS = (4, 9, 5, 11, 4, 7, 3, 6) * 2  # some shorter than the windows of the tiny models, some longer
STARTS = (1, 0) * 8


def sequences() -> list[list[int]]:
    """Return blocks repeated twice, three times or with an incomplete last copy, half of them after a BOS."""
    rng = np.random.default_rng(11)
    found = []
    for number, (period, start) in enumerate(zip(PERIODS, STARTS, strict=True)):
        block = rng.integers(3, VOCABULARY, period).tolist()
        found.append([BOS] * start + (block * 3)[: period * (2 + number % 2) + number % 3])
    return found


EXAMPLES = sequences()
ROWS = [{"input_ids": ids, "period": period} for ids, period in zip(EXAMPLES, PERIODS, strict=True)]


def eager_patterns(model: PreTrainedModel) -> list[list[Floats]]:
    """Return the attention weights of each layer and example; each example runs alone under eager attention."""
    before = model.config._attn_implementation or "eager"
    model.set_attn_implementation("eager")
    found: list[list[Floats]] = [[] for _ in range(LAYERS)]
    with torch.no_grad():
        for ids in EXAMPLES:
            output = model(input_ids=torch.tensor([ids]), output_attentions=True, use_cache=False)
            for layer, pattern_BHQK in enumerate(output.attentions):
                found[layer].append(pattern_BHQK[0].double().numpy())
    model.set_attn_implementation(before)
    return found


def scores_of(patterns: list[list[Floats]]) -> Floats:
    """Return scores, (layers x heads, scores)."""
    return np.concatenate([reference_scores(layer, EXAMPLES, PERIODS, STARTS) for layer in patterns])


def expected(model: PreTrainedModel) -> Floats:
    return scores_of(eager_patterns(model))


def values(table: pa.Table) -> Floats:
    return np.stack([table.column(name).to_numpy() for name in NAMES], axis=-1)


def capture(model: PreTrainedModel, out: Path, **options: Any) -> Archive:
    settings = {"sites": "q.*,k.*", "batch_tokens": 96, "rows_per_shard": 64, **options}
    return residua.capture_dataset(model, ROWS, out=out, **settings).archive


@pytest.mark.parametrize("name", TINY)
def test_queries_and_keys_give_the_scores_of_eager_attention(name: str, tmp_path: Path) -> None:
    model = TINY[name]()
    table = residua.induction_scores(capture(model, tmp_path / "a.zarr"))
    assert table.column_names == ["layer", "head", *NAMES]
    assert table.column("layer").to_pylist() == [layer for layer in range(LAYERS) for _ in range(4)]
    assert table.column("head").to_pylist() == [0, 1, 2, 3] * LAYERS
    patterns = eager_patterns(model)
    reference = scores_of(patterns)
    assert max(p[:, 3:].max() for p in patterns[1]) > 0.6, "attention that is spread evenly would prove little"
    assert np.abs(values(table) - reference).max() < 1e-6


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_queries_and_keys_give_close_scores(name: str, tmp_path: Path) -> None:
    """The attention of `TINY` is far sharper than that of trained models, so its scores are made smaller here."""
    model = with_mild_attention(TINY[name]())
    table = induction_scores(capture(model, tmp_path / "a.zarr", dtype="bfloat16"))
    assert np.abs(values(table) - expected(model)).max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "bert", "gemma2"])
def test_stored_patterns_give_the_same_scores(name: str, tmp_path: Path) -> None:
    model = TINY[name]()
    archive = capture(model, tmp_path / "a.zarr", sites="pattern.*,q.*,k.*")
    table = induction_scores(archive)
    assert np.abs(values(table) - expected(model)).max() < 1e-6
    assert table.equals(induction_scores(archive, source="pattern"))
    assert np.abs(values(induction_scores(archive, source="qk")) - values(table)).max() < 1e-6
    one = induction_scores(archive, layers=[1])
    assert one.equals(table.slice(4, 4))


def test_attention_sinks_take_their_share(tmp_path: Path) -> None:
    model = gpt_oss()
    found = values(induction_scores(capture(model, tmp_path / "a.zarr")))
    assert np.abs(found - expected(model)).max() < 1e-6


def test_patterns_of_some_rows_are_scored_on_those(tmp_path: Path) -> None:
    model = TINY["llama"]()
    archive = capture(model, tmp_path / "a.zarr", sites="pattern.1", positions="last")
    found = values(induction_scores(archive))
    patterns = [pattern[:, -1:] for pattern in eager_patterns(model)[1]]
    for head in range(4):
        on_stripe = [p[head, 0, p.shape[2] - period] for p, period in zip(patterns, PERIODS, strict=True)]
        assert found[head, 0] == pytest.approx(np.mean(on_stripe), abs=1e-6)


def test_period_and_bos_can_be_stated(tmp_path: Path) -> None:
    model = TINY["llama"]()
    data = [[BOS, 5, 6, 7, 5, 6, 7], [BOS, 8, 9, 4, 8, 9, 4, 8]]
    archive = residua.capture_dataset(model, data, sites="q.*,k.*", out=tmp_path / "a.zarr").archive
    found = induction_scores(archive, period=3)
    assert found.equals(induction_scores(str(archive.path), period=3, bos=True))
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "a.zarr.* 'period'.* period"),
        ({"period": 1}, "period is 1.* two tokens"),
        ({"period": 3, "bos": False}, "example 0 .* repeat .*3 tokens.* first token"),
        ({"period": 4}, "example 0 .* 4 tokens.* BOS"),
    )
    for options, message in wrong:
        with pytest.raises(AnalysisError, match=message):
            induction_scores(archive, **options)


def test_the_known_heads_of_the_shipped_model_stand_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    blocks = [rng.integers(1, 1024, 50).tolist() for _ in range(16)]
    for bos in (True, False):
        data = [[0] * bos + block + block for block in blocks]
        model = AutoModelForCausalLM.from_pretrained("models/pydoc-1m")
        out = tmp_path / f"{bos}.zarr"
        archive = residua.capture_dataset(model, data, sites="q.*,k.*", dtype="bfloat16", out=out).archive
        found = values(induction_scores(archive, period=50)).reshape(6, 4, len(NAMES))
        known = np.zeros((6, 4), bool)
        known[3] = True
        for score in ("induction", "prefix_matching"):
            assert found[known, NAMES.index(score)].min() > 0.5
            assert found[~known, NAMES.index(score)].max() < 0.05
        assert found[..., NAMES.index("previous_token")].max() > 0.5


def test_a_cluster_gives_the_same_to_the_bit(tmp_path: Path) -> None:
    archive = capture(TINY["gemma2"](), tmp_path / "a.zarr")
    cluster: Any = Backwards()
    here = induction_scores(archive, job_pairs=500)
    assert here.equals(induction_scores(archive, job_pairs=500, cluster=cluster))
    assert cluster.n_jobs > 4 * LAYERS
    assert np.abs(values(here) - expected(TINY["gemma2"]())).max() < 1e-6


def test_what_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    model = TINY["llama"]()
    some = capture(model, tmp_path / "some.zarr", positions="every:2")
    with pytest.raises(AnalysisError, match=r"example 0 .* 5 of its 9 positions.* all positions"):
        induction_scores(some)
    other = capture(model, tmp_path / "other.zarr", sites="q.*,k.1,resid_post.0")
    with pytest.raises(AnalysisError, match=r"layer 2 of .*other.zarr.* pattern.* q and k .*'q\.\*,k\.\*'"):
        induction_scores(other, layers=[1, 2])
    with pytest.raises(AnalysisError, match=r"other.zarr.* pattern"):
        induction_scores(other, source="pattern")
    assert induction_scores(other).num_rows == 4
    take_back(other.path, *other.commits)
    with pytest.raises(NotCapturedError):
        induction_scores(other.path)
