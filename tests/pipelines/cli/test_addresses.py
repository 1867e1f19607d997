"""An archive at an address in every job: the results are those of the same archive in its folder."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from dask import config as dask_config
from transformers import AutoModelForCausalLM, PreTrainedModel

import residua
from residua.analysis.support.cluster import connect
from residua.pipelines.cli.main import main
from residua.store.storage.objects import ObjectFolder
from tests.ragged import MODEL, write_dataset
from tests.servers.s3 import S3Server

pytestmark = pytest.mark.timeout(300)


class Both(NamedTuple):
    """One archive in a folder, and the same at an address of a server."""

    here: residua.Archive
    there: residua.Archive
    server: S3Server


@pytest.fixture(scope="module")
def both(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("data")
    dataset = write_dataset(folder / "ragged.jsonl", 30, seed=3)
    sites = "resid_post.2-5,q.1"
    residua.capture_dataset(str(MODEL), str(dataset), out=folder / "a.zarr", sites=sites, rows_per_shard=128)
    address = s3.address("addresses.zarr")
    residua.push(folder / "a.zarr", address, storage_options=s3.options, keep_paths=True)
    there = residua.open(address, storage_options=s3.options)
    return Both(residua.open(folder / "a.zarr"), there, s3)


def loaded() -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(MODEL)
    torch.nn.Module.train(model, False)
    return model


def test_jobs_on_workers_need_the_address_and_no_more(both: Both) -> None:
    with connect(workers=2) as cluster:
        figures = [residua.stats(archive, "resid_post.3,q.1", cluster=cluster) for archive in both[:2]]
        assert figures[0].sites.equals(figures[1].sites)
        assert figures[0].channels.equals(figures[1].channels)
        probes = [residua.probe(archive, "position > 5", sites="resid_post.3", cluster=cluster) for archive in both[:2]]
        assert probes[0].equals(probes[1])
        tops = [residua.top(archive, "resid_post.3", channel=5, k=9, cluster=cluster) for archive in both[:2]]
        assert tops[0].equals(tops[1])
        checked = [residua.verify(archive, cluster=cluster) for archive in both[:2]]
        assert checked[0].is_sound
        assert checked[0].n_chunks == checked[1].n_chunks > 0
        with dask_config.set(scheduler="threads"):
            blocks: Any = [residua.analysis.array(archive, "resid_post.2") for archive in both[:2]]
            assert np.array_equal(*(array.mean(0).compute() for array in blocks))


def test_batches_for_training_are_the_same(both: Both) -> None:
    loaders = [
        archive.loader(["resid_post.3"], batch_size=64, where="position > 0", seed=1, shuffle=True)
        for archive in both[:2]
    ]
    for one, other in zip(*loaders, strict=True):
        assert torch.equal(one["resid_post.3"], other["resid_post.3"])


def test_a_replay_from_stored_rows(both: Both) -> None:
    model = loaded()
    logits = []
    for archive in both[:2]:
        with residua.replay(model, archive, examples=[1], at="resid_post.3") as run:
            logits.append(run.logits[0])
    assert torch.equal(logits[0], logits[1])


def test_a_lens_is_trained_from_an_address(both: Both, tmp_path: Path) -> None:
    lenses = [
        residua.TunedLens.fit(archive, sites="resid_post.2", out=tmp_path / str(i), held_out=0.3)
        for i, archive in enumerate(both[:2])
    ]
    reports: Any = [lens.report for lens in lenses]
    assert reports[0].equals(reports[1])


def test_results_go_to_a_bucket(
    both: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment(both.server, monkeypatch)
    archive, out = str(both.here.path), both.server.address
    assert main(["stats", archive, "--sites", "q.1", "--out", out("results/stats"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == "s3://acts/results/stats"
    assert main(["top", archive, "--site", "resid_post.3", "--channel", "5", "--out", out("results/top.parquet")]) == 0
    residua.TunedLens.fit(
        both.there, sites="resid_post.2", out=out("results/lens"), storage_options=both.server.options, held_out=0.3
    )
    residua.probe(
        both.here, "position > 5", sites="q.1", save=out("results/probes"), storage_options=both.server.options
    )
    residua.page(both.there, out("results/page"), sites="q.1", examples=2, storage_options=both.server.options)
    folder = ObjectFolder(out("results"), both.server.options)
    there = {entry.name for entry in folder.list()}
    assert {"stats/sites.parquet", "stats/norms.png", "top.parquet"} < there
    assert {"page/index.html", "page/data/archive.js"} < there
    assert {"lens/params.pt", "lens/config.json", "lens/report.png"} < there
    lens = residua.TunedLens.load(out("results/lens"), storage_options=both.server.options)
    assert residua.analysis.LinearProbe.load(out("results/probes/q/1")) is not None
    with pytest.raises(residua.ResiduaError, match=r"s3://acts/results/stats"):
        residua.TunedLens.load(out("results/stats"))
    page: dict[str, Any] = {"lens": out("results/lens"), "sites": "resid_post.2", "examples": 2, "lens_examples": 2}
    assert residua.page(both.here, tmp_path / "page", **page).n_examples >= 2
    words = ["--site", "q.1", "--direction", out("results/probes/q/1/probe.safetensors")]
    assert main(["top", archive, *words, "--json"]) == 0
    for name in there:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(folder.read(name, 2**30))
    table: Any = pq.read_table(tmp_path / "top.parquet")
    assert table.equals(residua.top(both.here, "resid_post.3", channel=5, k=20))
    read = residua.TunedLens.load(tmp_path / "lens")
    assert read.report is not None
    assert all(torch.equal(lens.translators[layer].weight, one.weight) for layer, one in read.translators.items())
    assert residua.analysis.LinearProbe.load(tmp_path / "probes/q/1") is not None
    with pytest.raises(residua.ResiduaError, match=r"https://example\.org/x.*not written to"):
        residua.probe(both.here, "position > 5", sites="q.1", save="https://example.org/x")
    assert main(["stats", archive, "--out", "s3://no-such-bucket/x"]) != 0
    assert "no-such-bucket" in capsys.readouterr().err


def environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the command line what the tools of S3 take from the environment."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)


def test_the_command_line(
    both: Both, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    environment(both.server, monkeypatch)
    address = both.server.address("addresses.zarr")

    def shown(*words: str | Path) -> Any:
        assert main([*map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    info = shown("info", address)
    assert info["path"] == address
    assert {**info, "path": ""} == {**shown("info", both.here.path), "path": ""}
    assert shown("verify", address)["sound"]
    pulled = shown("pull", address, tmp_path / "some.zarr", "--sites", "q.1")
    assert pulled["n_bytes"] == pulled["sent_bytes"]
    assert residua.open(tmp_path / "some.zarr").sites == ("q.1",)
    pushed = shown("push", both.here.path, both.server.address("addresses-again.zarr"))
    assert pushed["sent_bytes"] == pushed["n_bytes"]
    assert main(["info", both.server.address("nothing.zarr")]) == 2
    assert "nothing.zarr is not an archive" in capsys.readouterr().err
