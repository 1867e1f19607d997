"""The numbers of a page are those of float64 numpy on the archive's rows; what cannot be shown is refused first."""

import base64
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from safetensors.numpy import save

import residua
from residua.analysis.attention.jobs import MOST_BYTES, attention_jobs
from residua.analysis.page.heads import example_pattern
from residua.analysis.support.cluster import connect
from residua.store.base.errors import AnalysisError, PlanError, UnknownSiteError
from residua.store.format.sidecars import AttentionSpec, LMHeadSpec
from tests.analysis.attention_archive import dense_weights, make_qk_archive
from tests.analysis.page.conftest import LENGTHS, SPEC, WORDS, Made, registered
from tests.analysis.rows_archive import write_rows
from tests.plain_zarr import plain_array
from tests.servers.files import serving_files

RNG = np.random.default_rng(5)
STARTS = np.concatenate([[0], np.cumsum(LENGTHS)])


def numbers(text: str, dtype: str = "<f4") -> npt.NDArray[Any]:
    return np.frombuffer(base64.b64decode(text), dtype)


def wide_rows(made: Made, site: str) -> npt.NDArray[np.float64]:
    rows = plain_array(made.archive, f"sites/{site.replace('.', '/')}")
    return rows.reshape(len(rows), -1).astype(np.float64)


def expected_measures(made: Made, site: str) -> dict[str, npt.NDArray[np.float64]]:
    rows = wide_rows(made, site)
    found = {"norm": np.linalg.norm(rows, axis=1), "distance": np.linalg.norm(rows - rows.mean(0), axis=1)}
    if site == "resid_post.1":
        found["channel:2"] = rows[:, 2]
        found[f"{made.archive.parent}/sae.safetensors#W_dec[0]"] = rows @ made.vector
    elif site == "resid_post.0":
        found["logit of plain"] = rows @ made.unembed[6].astype(np.float64)
    elif site == "q.1":
        found["</script>'\""] = rows.sum(1)
    return found


@pytest.mark.parametrize("number", range(4))
def test_measures_histograms_and_strongest_rows_are_those_of_numpy(made: Made, number: int) -> None:
    archive = registered(made.page, "archive")
    site = archive["sites"][number]
    expected = expected_measures(made, site["site"])
    assert [one["name"] for one in site["measures"]] == list(expected)
    stored = registered(made.page, archive["files"]["values"][site["site"]].removeprefix("data/").removesuffix(".js"))
    for one, packed, scores in zip(site["measures"], stored, expected.values(), strict=True):
        np.testing.assert_allclose(numbers(packed), scores, rtol=1e-6, atol=1e-6)
        bins = one["histogram"]["bins"]
        edges = bins["start"] + bins["width"] * np.arange(len(bins["counts"]) + 1)
        inside = [np.count_nonzero((scores >= low) & (scores < high)) for low, high in pairwise(edges)]
        assert bins["counts"] == pytest.approx(inside, abs=1)  # a score on a border may round to either side
        assert bins["below"] + sum(bins["counts"]) + bins["above"] == len(scores)
        for rows, sign in ((one["strongest"], 1), (one["weakest"], -1)):
            best = [start + int(np.argmax(sign * scores[start:stop])) for start, stop in pairwise(STARTS)]
            best = sorted(best, key=lambda row: -sign * scores[row])[:3]
            assert [line["row"] for line in rows] == best
            assert [line["score"] for line in rows] == pytest.approx(scores[best].tolist())
            assert all(STARTS[line["example"]] + line["position"] == line["row"] for line in rows)
    values = wide_rows(made, site["site"])
    assert site["variance"] == pytest.approx(values.var())
    assert site["norm_mean"] == pytest.approx(expected["norm"].mean())
    assert len(site["positions"]["norm_mean"]) == max(LENGTHS)


@pytest.mark.parametrize("site", ["resid_post.0", "resid_post.1"])
def test_readouts_of_the_logit_lens_are_the_softmax_of_the_unembedding(made: Made, site: str) -> None:
    files = registered(made.page, "archive")["files"]["readouts"]
    assert set(files) == {"resid_post.0", "resid_post.1"}
    stored = registered(made.page, files[site].removeprefix("data/").removesuffix(".js"))
    logits = wide_rows(made, site) @ made.unembed.astype(np.float64).T
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    best = np.argsort(-shares, axis=1)[:, : stored["k"]]
    assert (numbers(stored["tokens"], "<i4").reshape(-1, stored["k"]) == best).all()
    found = numbers(stored["probabilities"]).reshape(-1, stored["k"])
    np.testing.assert_allclose(found, np.take_along_axis(shares, best, 1), rtol=1e-4)


def test_a_lens_reads_rows_of_the_head_s_width_only(tmp_path: Path) -> None:
    head = {"head/head.safetensors": save({"unembed.weight": RNG.standard_normal((5, 4)).astype(np.float32)})}
    head["head/head.json"] = LMHeadSpec(norm="none", dtype="float32").to_json()
    sites = {f"resid_post.{i}": RNG.standard_normal((6, width)).astype(np.float32) for i, width in enumerate((3, 4))}
    archive = write_rows(tmp_path / "a.zarr", [6], {**sites, "attn_out.0": sites["resid_post.1"]}, files=head)
    assert residua.page(archive, tmp_path / "page").notes == ()
    assert list(registered(tmp_path / "page", "archive")["files"]["readouts"]) == ["resid_post.1"]
    assert any("lens" in note for note in residua.page(archive, tmp_path / "page", sites="*.0").notes)


def test_patterns_are_the_softmax_of_stored_queries_and_keys(made: Made) -> None:
    archive = registered(made.page, "archive")
    assert list(archive["files"]["patterns"]) == ["1"]
    stored = registered(made.page, "pattern-1")
    query, key = (plain_array(made.archive, f"sites/{name}/1").astype(np.float64) for name in ("q", "k"))
    chosen = archive["patterns"]
    for at, n, packed in zip(chosen["examples"], chosen["n_tokens"], stored["weights"], strict=True):
        rows = slice(STARTS[at], STARTS[at] + n)
        keys = np.repeat(key[rows].swapaxes(0, 1), 2, axis=0)
        score = SPEC.scale * query[rows].swapaxes(0, 1) @ keys.swapaxes(1, 2)
        back = np.subtract.outer(np.arange(n), np.arange(n))
        weight = np.where((back >= 0) & (back < (SPEC.window or n)), np.exp(score), 0)
        weight /= weight.sum(-1, keepdims=True)
        found = numbers(packed, "u1").reshape(weight.shape) / 255
        np.testing.assert_allclose(found, weight, atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(scale=0.3, causal=True),
        AttentionSpec(scale=0.3, causal=False),
        AttentionSpec(scale=2.0, causal=True, softcap=1.5, window=3),
        AttentionSpec(scale=0.5, causal=True, sinks=(0.1, -1.0, 2.0, 0.0)),
    ],
    ids=["causal", "both ways", "window and soft cap", "sinks"],
)
@pytest.mark.parametrize("n_tokens", [4, 9])
def test_a_pattern_of_some_tokens_is_a_part_of_the_full_one(spec: AttentionSpec, n_tokens: int, tmp_path: Path) -> None:
    archive = make_qk_archive(tmp_path / "a.zarr", [list(range(5)), list(range(9))], spec)
    (job,) = attention_jobs(archive, layers=None, source=None, most_bytes=MOST_BYTES)
    expected = dense_weights(archive, 1, spec)[:, :n_tokens, :n_tokens]
    np.testing.assert_allclose(example_pattern(job, 1, n_tokens), expected, atol=1e-6)


def test_data_files_are_ascii_without_a_sign_that_opens_a_tag(made: Made) -> None:
    files = sorted((made.page / "data").glob("*.js"))
    assert len(files) > 8
    for path in files:
        content = path.read_bytes()
        assert not set(content) & set(b"<>&\x7f")
        assert max(content) < 128
        assert content.count(b"\n") == 1
    assert registered(made.page, "examples")["texts"] == {str(i): word for i, word in enumerate(WORDS)}


def test_examples_are_spread_evenly_and_those_of_strongest_rows_come_besides(tmp_path: Path) -> None:
    values = RNG.standard_normal((400, 3)).astype(np.float32)
    values[7 * 4 + 1] = 100
    values[71 * 4] = np.nan
    archive = write_rows(tmp_path / "a.zarr", [4] * 100, {"embed": values}, sealed=False)
    residua.page(archive, tmp_path / "page", examples=10, tokens=2, k=1)
    found = registered(tmp_path / "page", "examples")
    assert set(range(0, 100, 10)) | {7} <= set(found["numbers"])
    assert len(found["numbers"]) <= 14
    assert set(found["n_shown"]) == set(found["n_rows"]) == {2}
    assert set(found["n_tokens"]) == {4}
    (site,) = registered(tmp_path / "page", "archive")["sites"]
    norms = site["measures"][0]
    assert (norms["histogram"]["n"], norms["histogram"]["nonfinite"]) == (399, 1)
    assert norms["strongest"][0]["row"] == 29
    before = {path.name: path.read_bytes() for path in (tmp_path / "page" / "data").iterdir()}
    (tmp_path / "page" / "data" / "archive.js").unlink()  # as where a page was stopped
    residua.page(archive.path, tmp_path / "page", examples=10, tokens=2, k=1)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "page" / "data").iterdir()}


def test_a_cluster_and_an_address_give_the_same_page(made: Made, scheduler: str, tmp_path: Path) -> None:
    with connect(scheduler) as cluster, serving_files(made.archive.parent) as server:
        residua.page(made.archive, tmp_path / "there", sites="*.1", cluster=cluster)
        residua.page(made.archive, tmp_path / "here", sites="*.1")
        residua.page(f"{server.url}/acts.zarr", tmp_path / "web", sites="*.1")
    for path in (tmp_path / "here" / "data").iterdir():
        content = path.read_bytes()
        assert (tmp_path / "there" / "data" / path.name).read_bytes() == content
        if path.name != "archive.js":  # which says where the archive is
            assert (tmp_path / "web" / "data" / path.name).read_bytes() == content


def test_scores_of_heads_come_from_a_table(made: Made, tmp_path: Path) -> None:
    table = pa.table(
        {"layer": [1, 0], "head": pa.array([0, 3], pa.int32()), "induction": [0.9, None], "note": ["a", "b"]}
    )
    residua.page(made.archive, tmp_path / "page", sites="resid_post.0", heads=table, lens_examples=0)
    scores = registered(tmp_path / "page", "archive")["scores"]
    assert scores == {"names": ["induction"], "layer": [0, 1], "head": [3, 0], "induction": [None, 0.9]}


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"sites": "resid_post.9"}, UnknownSiteError, "resid_post.9"),
        ({"examples": 0}, AnalysisError, "examples"),
        ({"directions": ["resid_post.1=channel:6"]}, AnalysisError, "6"),
        ({"directions": ["resid_post.*=channel:1"]}, AnalysisError, "resid_post"),
        ({"directions": ["channel:1"]}, AnalysisError, "SITE=WHAT"),
        ({"directions": ["resid_post.1=nowhere.npy"]}, AnalysisError, "nowhere.npy"),
        ({"directions": ["resid_post.1=logit:"]}, PlanError, "no token"),
        ({"directions": ["resid_post.1=logit:99"]}, AnalysisError, "99"),
        ({"directions": ["norm:=resid_post.1=channel:1"]}, AnalysisError, "norm"),
        ({"directions": [("mine", "resid_post.1", [1, 2])]}, AnalysisError, "mine"),
        ({"directions": [("mine", "resid_post.1", [np.nan] * 6)]}, AnalysisError, "finite"),
        ({"lens": "nowhere"}, AnalysisError, "nowhere"),
        ({"heads": "nowhere"}, AnalysisError, "nowhere"),
        ({"heads": pa.table({"layer": [1]})}, AnalysisError, "layer"),
        ({"out": "https://host/page"}, PlanError, "host"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_rows_are_read(
    made: Made,
    options: dict[str, Any],
    error: type[Exception],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("residua.analysis.page.page.stats", lambda *_, **__: pytest.fail("rows were read"))
    settings: dict[str, Any] = {"archive": made.archive, "out": tmp_path / "page"} | options
    with pytest.raises(error, match=says.replace("*", r"\*")):
        residua.page(**settings)
    assert not (tmp_path / "page").exists()


def test_a_folder_with_other_files_is_left_alone(made: Made, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        residua.page(made.archive, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
