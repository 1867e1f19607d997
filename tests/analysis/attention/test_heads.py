"""The measures of heads, compared with HeadVis's definitions on the model's eager attention in float64."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedModel

import residua
from residua.analysis.attention.heads import MEASURES
from residua.pipelines.cli.main import main
from residua.store.base.errors import AnalysisError
from residua.store.format.sidecars import AttentionSpec
from residua.store.read.archive import Archive
from tests.analysis.attention_archive import dense_weights, make_qk_archive
from tests.analysis.backwards import Backwards
from tests.models.tiny import LAYERS, TINY, gpt_oss

Floats = npt.NDArray[np.float64]


def examples() -> list[list[int]]:
    """Return examples of very different lengths, in which some tokens occur often."""
    rng = np.random.default_rng(5)
    return [[1, *rng.integers(3, 12, n).tolist()] for n in (30, 1, 11, 47, 20, 3, 16, 9, 25, 6, 40, 13)]


EXAMPLES = examples()


MODELS = {name: TINY[name] for name in ("gpt2", "llama", "gemma2", "bert")} | {"gpt-oss": gpt_oss}


def eager(model: PreTrainedModel) -> list[list[Floats]]:
    """Return the attention weights of each layer and example, (heads, queries, keys)."""
    before = model.config._attn_implementation or "eager"
    model.set_attn_implementation("eager")
    found: list[list[Floats]] = [[] for _ in range(LAYERS)]
    with torch.no_grad():
        for ids in EXAMPLES:
            attentions = model(input_ids=torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
            for layer, pattern_BHQK in enumerate(attentions):
                found[layer].append(pattern_BHQK[0].double().numpy())
    model.set_attn_implementation(before)
    return found


def expected(patterns: Sequence[Floats], examples: Sequence[Sequence[int]] = EXAMPLES) -> Floats:
    """Return the measures of one layer's heads, (heads, measures), from all its pairs at once."""
    own, previous, entropies, induction = [], [], [], []
    distances, weights = [], []
    for pattern, ids in zip(patterns, examples, strict=True):
        at = np.arange(len(ids))
        own += list(pattern[:, at, at].T)
        previous += list(pattern[:, at[1:], at[:-1]].T)
        logs = np.log(pattern, out=np.zeros_like(pattern), where=pattern > 0)
        entropies += list(-(pattern * logs).sum(-1).T)
        distances.append(np.abs(at[:, None] - at).ravel())
        weights.append(pattern.reshape(len(pattern), -1))
        for query in range(len(ids)):
            keys = [j + 1 for j in range(query) if ids[j] == ids[query]]
            induction += [pattern[:, query, keys].sum(-1)] if keys else []
    distance, weight = np.concatenate(distances).astype(np.float64), np.concatenate(weights, axis=1)
    mean = (weight * distance).sum(1) / weight.sum(1)
    variance = (weight * (distance - mean[:, None]) ** 2).sum(1) / weight.sum(1)
    columns = [np.mean(own, 0), np.mean(previous, 0), np.mean(entropies, 0), mean, variance, np.mean(induction, 0)]
    return np.stack(columns, axis=-1)


def values(table: pa.Table) -> Floats:
    return np.stack([table.column(name).to_numpy() for name in MEASURES], axis=-1)


def capture(model: PreTrainedModel, out: Path, **options: Any) -> Archive:
    settings = {"sites": "q.*,k.*", "batch_tokens": 96, "rows_per_shard": 64, **options}
    return residua.capture_dataset(model, EXAMPLES, out=out, **settings).archive


@pytest.mark.parametrize("name", MODELS)
def test_they_are_those_of_eager_attention(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    if name != "gpt-oss":  # whose experts need float32
        model.double()
    archive = capture(model, tmp_path / "a.zarr")
    table = residua.heads(archive)
    assert table.column_names == ["layer", "head", *MEASURES]
    reference = np.concatenate([expected(patterns) for patterns in eager(model)])
    np.testing.assert_allclose(values(table), reference, rtol=1e-5, atol=1e-6)
    some = residua.heads(str(archive.path), layers=[2, 1])
    assert some.equals(table.slice(4))


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_stored_patterns_give_the_same(name: str, tmp_path: Path) -> None:
    archive = capture(MODELS[name](), tmp_path / "a.zarr", sites="pattern.*,q.*,k.*")
    found = [values(residua.heads(archive, source=source)) for source in ("pattern", "qk")]
    np.testing.assert_allclose(found[0], found[1], rtol=2e-5, atol=1e-5)
    stored = [[archive.example(n, [f"pattern.{layer}"])[f"pattern.{layer}"] for n in range(12)] for layer in range(3)]
    patterns = [[one.swapaxes(0, 1)[..., : one.shape[0]].astype(np.float64) for one in layer] for layer in stored]
    np.testing.assert_allclose(found[0], np.concatenate([expected(layer) for layer in patterns]), rtol=1e-12)


SPECS = {
    "wide": AttentionSpec(scale=0.3, causal=True),
    "window": AttentionSpec(scale=0.3, causal=True, window=70),
    "both": AttentionSpec(scale=0.3, causal=False, softcap=2.0),
    "sinks": AttentionSpec(scale=0.3, causal=True, window=300, sinks=(3.0, -50.0, 50.0, 0.0, 1.0, 2.0)),
}


@pytest.mark.parametrize("most_bytes", [60_000, 2**23])  # for tiles of 8 x 8 and of 256 x 256, and few or all heads
@pytest.mark.parametrize("name", SPECS)
def test_tiles_and_slices_of_heads_do_not_show(name: str, most_bytes: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 90, n).tolist() for n in (300, 5, 270)]
    archive = make_qk_archive(tmp_path / "a.zarr", ids, SPECS[name], heads=(6, 2), width=6)
    patterns = [dense_weights(archive, number, SPECS[name]) for number in range(3)]
    found = values(residua.heads(archive, most_bytes=most_bytes))
    np.testing.assert_allclose(found, expected(patterns, ids), rtol=3e-6, atol=1e-8)


def test_a_cluster_gives_the_same_to_the_bit(tmp_path: Path) -> None:
    archive = capture(MODELS["gemma2"](), tmp_path / "a.zarr")
    cluster: Any = Backwards()
    here = residua.heads(archive, out=tmp_path / "here", job_pairs=500, layers=[1])
    assert here.equals(residua.heads(archive, out=tmp_path / "there", job_pairs=500, layers=[1], cluster=cluster))
    files = {path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("*.json")}
    assert len(files) == 4 + 4
    for file in files:
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes()


def test_the_tree_is_what_headvis_opens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = MODELS["llama"]()
    archive = capture(model, tmp_path / "a.zarr")
    out = tmp_path / "heads"
    flags = ["--out", str(out), "--scheduler", "inline", "--sequences", "1", "--json"]
    assert main(["heads", str(archive.path), *flags]) == 0
    said = json.loads(capsys.readouterr().out)
    table = pq.read_table(out / "measures.parquet")
    assert (said["heads"], said["folder"], said["highest"].keys()) == (12, str(out), set(MEASURES))
    with (out / "measures.csv").open() as file:
        assert [float(row["qk_distance"]) for row in csv.DictReader(file)] == table["qk_distance"].to_pylist()
    assert (out / "measures.png").read_bytes().startswith(b"\x89PNG")
    config, rows = (json.loads((out / f"{name}.json").read_text()) for name in ("config", "scatter_data"))
    assert config["heads"] == [[layer, head] for layer in range(LAYERS) for head in range(4)]
    assert (config["n_layers"], config["n_heads"], config["n_intervals"]) == (LAYERS, 4, 10)
    assert config["metrics"] == list(MEASURES) == list(config["metric_descriptions"])
    assert [[row["layer"], row["head"]] for row in rows] == config["heads"]
    np.testing.assert_allclose([[row[name] for name in MEASURES] for row in rows], values(table), atol=1e-6)
    assert json.loads((out / "server_config.json").read_text()) == {}
    assert json.loads((out / "attributions" / "manifest.json").read_text()) == {}
    patterns = eager(model)
    for layer, head in config["heads"]:
        name = config["head_data_pattern"].replace("{layer}", str(layer)).replace("{head}", str(head))
        content = json.loads((out / "heads" / name).read_text())
        check_head(content, [pattern[head] for pattern in patterns[layer]])
        assert {plot["key"] for plot in config["custom_plots"]} <= content.keys()
        assert {plot["key"] for plot in config["custom_tables"]} <= content.keys()
        assert content["statistics"].keys() == config["statistics_display"].keys()


def check_head(content: dict[str, Any], patterns: Sequence[Floats]) -> None:
    """Compare one head's file with its patterns: HeadVis leaves the first query and key out of the strongest."""
    strongest = [pattern[1:, 1:].max() for pattern in patterns]
    assert [one["interval"] for one in content["sequences"]] == list(range(1, 11))
    order = [strongest[one["sequence_id"]] for one in content["sequences"]]
    assert order == sorted(order)
    assert order[-1] == max(strongest)
    mass: dict[str, float] = {}
    histogram = np.zeros(13)
    for one in content["sequences"]:
        pattern, ids = patterns[one["sequence_id"]], EXAMPLES[one["sequence_id"]]
        assert one["tokens"] == [str(token) for token in ids]
        assert one["seq_len"] == len(ids)
        assert one["max_activation"] == pytest.approx(strongest[one["sequence_id"]], abs=1e-4)
        stored = np.zeros(len(ids) ** 2)
        stored[one["attention_indices"]] = one["attention_values"]
        least = np.sort(pattern, axis=1)[:, -min(8, len(ids)), None]
        wanted = np.where((pattern >= least) & (pattern >= 0.005), pattern, 0)
        np.testing.assert_allclose(stored.reshape(pattern.shape), wanted, atol=1e-4)
        for index, weight in zip(one["attention_indices"], one["attention_values"], strict=True):
            query, key = divmod(index, len(ids))
            mass[str(ids[key])] = mass.get(str(ids[key]), 0.0) + weight
            histogram[int(np.abs(query - key)).bit_length()] += weight
    shape = content["qk_distance_histogram"]
    assert shape["bin_edges"][:5] == [0, 1, 2, 4, 8]
    np.testing.assert_allclose(shape["bin_values"], histogram, atol=1e-3)
    assert {line["token"]: line["weight"] for line in content["top_key_tokens"]} == pytest.approx(mass, abs=1e-3)
    assert sum(content["histogram"]["bin_values"]) == len(patterns)
    assert content["statistics"]["mean_max_activation"] == pytest.approx(np.mean(strongest), abs=1e-4)


def test_measures_without_a_query_are_null(tmp_path: Path) -> None:
    archive = make_qk_archive(tmp_path / "a.zarr", [[4], [5]], SPECS["wide"], heads=(6, 2))
    (line, *_) = residua.heads(archive, out=tmp_path / "heads").to_pylist()
    assert line == dict.fromkeys(("layer", "head", *MEASURES[2:5]), 0) | {
        "self_attention_score": 1,
        "previous_token_score": None,
        "induction_score": None,
    }
    assert json.loads((tmp_path / "heads" / "scatter_data.json").read_text())[0]["induction_score"] is None


def test_what_cannot_be_measured_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = make_qk_archive(tmp_path / "bias.zarr", [[4, 5, 6]], "its bias is by position", heads=(6, 2))
    with pytest.raises(AnalysisError, match=r"layer 0 of .*bias\.zarr.* its bias is by position.*pattern"):
        residua.heads(told)
    assert main(["heads", str(told.path), "--out", str(tmp_path / "none"), "--scheduler", "inline"]) == 2
    assert "its bias is by position" in capsys.readouterr().err
    model = MODELS["llama"]()
    other = capture(model, tmp_path / "other.zarr", sites="resid_post.0")
    with pytest.raises(AnalysisError, match=r"other\.zarr.* q and k .*'q\.\*,k\.\*'"):
        residua.heads(other)
    some = capture(model, tmp_path / "some.zarr", positions="every:2")
    with pytest.raises(AnalysisError, match=r"some\.zarr keeps 16 of its 31 positions"):
        residua.heads(some)
    with pytest.raises(AnalysisError, match=r"sequences.*-1"):
        residua.heads(some, sequences=-1)
