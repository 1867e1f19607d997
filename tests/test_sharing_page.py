"""Run what docs/sharing.md says, against servers of ours: of the Hub, and S3."""

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import distributed
import pytest
from datasets import load_dataset

import residua
from residua.pipelines.cli.main import main
from residua.store.storage.objects import ObjectFolder
from residua.store.verification.verify import verify
from tests.pages import blocks, run
from tests.ragged import MODEL, write_dataset
from tests.servers.hub import HubServer, serving_hub
from tests.servers.hub_client import use_hub
from tests.servers.s3 import S3Server

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # of huggingface_hub's own requests
]
PAGE = "docs/sharing.md"
LocalCluster: Any = distributed.LocalCluster  # its functions have no types
N_EXAMPLES = 12


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    dataset = write_dataset(folder / "ragged.jsonl", N_EXAMPLES, seed=3)
    residua.capture_dataset(
        str(MODEL), str(dataset), out=folder / "acts.zarr", sites="resid_post.3", rows_per_shard=128
    )
    return folder / "acts.zarr"


@pytest.fixture
def hub(tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.chdir(archive.parent)
    monkeypatch.setenv("RESIDUA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "hub").mkdir()
    with serving_hub(tmp_path / "hub") as hub:
        use_hub(monkeypatch, hub)
        yield hub


def walk(section: str, **places: str) -> list[str]:
    """Run the commands of a section, and return them; in them, `places` take the place of the page's."""
    found = [line for block in blocks(PAGE, section, language="console") for line in block.splitlines()]
    commands = [line.removeprefix("$ ").partition("#")[0] for line in found if line.startswith("$ residua")]
    for command in commands:
        words = command.replace("ORG/NAME", "org/acts").replace("ORG/", "org/").replace("MODEL", str(MODEL))
        for name, place in places.items():
            words = words.replace(name, place)
        assert main(shlex.split(words)[1:]) == 0, command
    return commands


def test_publish_check_and_reproduce(
    hub: HubServer, archive: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert len(walk("Publish on the Hub")) == 4
    shown = capsys.readouterr().out
    assert "sound" in shown
    assert "acts-hub.zarr" in shown
    assert len(walk("Check somebody's archive")) == 3
    shown = capsys.readouterr().out
    commit = hub.repositories["datasets/org/acts"].branches["main"]
    assert f"hf://datasets/org/acts@{commit}" in shown
    assert "reproduced: every row is equal bit for bit" in shown


def login(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give what the tools of S3 take from the environment."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)


def objects(server: S3Server, folder: str) -> set[str]:
    return {entry.name for entry in ObjectFolder(server.address(folder), server.options).list()}


def records(server: S3Server, folder: str) -> set[str]:
    """Return the commit records, which a copy leaves behind."""
    return {name for name in objects(server, folder) if name.startswith("commits/")}


def test_a_bucket_from_capture_to_copy(
    s3: S3Server,
    archive: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Capture into a bucket, publish, look at it, probe it on a cluster, and take it home."""
    login(s3, monkeypatch)
    monkeypatch.chdir(archive.parent)
    words = ["capture", "--model", str(MODEL), "--dataset", "ragged.jsonl", "--sites", "resid_post.3"]
    assert main([*words, "--rows-per-shard", "128", "--out", s3.address("captured/acts.zarr")]) == 0
    assert len(walk("Publish", **{"s3://my-bucket": s3.address("pub")})) == 2
    assert "sound" in capsys.readouterr().out
    assert objects(s3, "captured/acts.zarr") - objects(s3, "pub/acts.zarr") == records(s3, "captured/acts.zarr")
    monkeypatch.chdir(tmp_path)  # the archive's folder is not here
    with LocalCluster(n_workers=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as workers:
        places = {"s3://my-bucket": s3.address("pub"), "tcp://HOST:8786": workers.scheduler_address}
        assert len(walk("A probe on a cluster, from a bucket", **places)) == 1
        assert {"probe.parquet", "probe.png"} < objects(s3, "pub/probe")
        (code,) = blocks(PAGE, "A probe on a cluster, from a bucket")
        options = repr({**s3.options})
        code = code.replace('{"region": "eu-west-1"}', options)
        for name, place in places.items():
            code = code.replace(name, place)
        names: dict[str, Any] = {"residua": residua}
        run([code], names)
        assert names["found"].equals(residua.probe(archive, "position > 5", sites="resid_post.*"))
    home = {"hf://datasets/org/acts": s3.address("pub/acts.zarr")}
    assert len(walk("Take it home", **home)) == 2
    assert verify(tmp_path / "acts.zarr").is_sound


def test_the_examples_load(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", str(archive), "--license", "mit"]) == 0

    def load(name: str, *words: str, **options: str) -> object:
        assert name == "ORG/NAME"
        return load_dataset(str(archive), *words, cache_dir=str(tmp_path), **options)

    (code,) = blocks(PAGE, "Publish on the Hub")
    loaded: dict[str, Callable[..., object] | list[object]] = {"load_dataset": load}
    run([code.partition("\n")[2]], loaded)
    examples = loaded["examples"]
    assert isinstance(examples, object)
    assert len(examples) == N_EXAMPLES  # type: ignore[arg-type]
