"""Run what docs/sharing.md says about the Hub, against a server of ours."""

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from datasets import load_dataset

import residua
from residua.pipelines.cli.main import main
from tests.pages import blocks, run
from tests.ragged import MODEL, write_dataset
from tests.servers.hub import HubServer, serving_hub
from tests.servers.hub_client import use_hub

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # of huggingface_hub's own requests
]
PAGE = "docs/sharing.md"
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


def walk(section: str) -> list[str]:
    """Run the commands of a section, and return them."""
    found = [line for block in blocks(PAGE, section, language="console") for line in block.splitlines()]
    commands = [line.removeprefix("$ ").partition("#")[0] for line in found if line.startswith("$ residua")]
    for command in commands:
        words = command.replace("ORG/NAME", "org/acts").replace("ORG/", "org/").replace("MODEL", str(MODEL))
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
