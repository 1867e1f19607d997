"""How the provenance names a dataset, and which commit of the hub is read."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from datasets.data_files import DataFilesDict
from datasets.packaged_modules.csv.csv import CsvConfig
from datasets.packaged_modules.parquet.parquet import ParquetConfig
from huggingface_hub import HfApi

from residua.pipelines.data.dataset import dataset_identity
from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.pipelines.data.sources import open_rows
from residua.store.base.canonical import canonical_json, digest_of
from tests.pipelines.dataset_samples import ids, read, tokens, write_source


class TestHub:
    def test_one_commit_is_read_and_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[object] = []

        def load_builder(*args: object, **options: object) -> object:
            asked.append((args, options))
            stream = datasets.Dataset.from_dict({"text": ["a b"]}).to_iterable_dataset()
            splits = datasets.IterableDatasetDict({"test": stream})
            return SimpleNamespace(config=ParquetConfig(), as_streaming_dataset=lambda: splits)

        def dataset_info(_api: object, name: str, *, revision: str | None, timeout: float) -> object:
            assert timeout <= 10
            return SimpleNamespace(sha=f"commit of {name}@{revision}")

        monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
        monkeypatch.setattr(datasets, "load_dataset_builder", load_builder)
        examples, _ = read("someone/texts", subset="en", split="test")
        assert tokens(examples) == [ids("<s> a b")]
        commit = "commit of someone/texts@None"
        assert asked == [(("someone/texts", "en"), {"revision": commit})]
        assert dataset_identity("someone/texts", DatasetSettings(subset="en", split="test")) == {
            "kind": "hub",
            "id": "someone/texts",
            "subset": "en",
            "split": "test",
            "revision": commit,
        }

    def test_files_of_text_are_read_as_they_are_spelled(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "x.csv").write_text("text,label\nnull,1\nNA,2\n")
        files: Any = {"train": [(tmp_path / "x.csv").as_uri()]}
        builder = SimpleNamespace(
            config=CsvConfig(data_files=DataFilesDict(files)), info=SimpleNamespace(features=None)
        )
        monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha="c0"))
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
        rows = open_rows("someone/texts", DatasetSettings()).rows
        assert list(rows) == [{"text": "null", "label": 1}, {"text": "NA", "label": 2}]

    @pytest.mark.parametrize(
        ("variables", "found"),
        [
            ({"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}, "ConnectError"),
            ({"HF_HUB_OFFLINE": "1"}, "ConnectionError"),
        ],
    )
    def test_a_missing_network_is_reported_at_once(self, tmp_path: Path, variables: dict[str, str], found: str) -> None:
        program = (
            "from residua.pipelines.data.dataset import read_examples\n"
            "from residua.pipelines.data.dataset_settings import DatasetSettings\n"
            "from residua.store.base.errors import DatasetError\n"
            "try:\n    read_examples('someone/texts', settings=DatasetSettings())\n"
            "except DatasetError as error:\n    print(error)\n"
        )
        environment = {**os.environ, "HF_HOME": str(tmp_path), **variables}
        result = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        assert "dataset 'someone/texts': there is no such file or folder" in result.stdout
        assert f"could not be read from the hub ({found}" in result.stdout


class TestIdentity:
    def test_the_first_of_many_files_are_named_and_all_are_counted(self, tmp_path: Path) -> None:
        for number in range(250):
            (tmp_path / f"{number:03d}.txt").write_text("x" * number)
        before = dataset_identity(tmp_path, DatasetSettings())
        assert isinstance(before["files"], list)
        assert (len(before["files"]), before["n_files"]) == (100, 250)
        (tmp_path / "249.txt").write_text("y")
        after = dataset_identity(tmp_path, DatasetSettings())
        assert before["files"] == after["files"]
        assert before["files_digest"] != after["files_digest"]

    def test_what_names_a_dataset(self, tmp_path: Path) -> None:
        path = write_source(tmp_path, "jsonl")
        chosen = DatasetSettings(split="train")
        assert dataset_identity(path, chosen) == {
            "kind": "local",
            "path": str(path),
            "split": "train",
            "files": [{"name": "data.jsonl", "bytes": path.stat().st_size}],
            "n_files": 1,
            "files_digest": digest_of([{"name": "data.jsonl", "bytes": path.stat().st_size}]),
        }
        folder = write_source(tmp_path, "folder")
        assert dataset_identity(folder, chosen)["files"] == [
            {"name": "data.folder/part-0.parquet", "bytes": (folder / "part-0.parquet").stat().st_size}
        ]
        dataset = datasets.Dataset.from_dict({"text": ["a"]})
        assert dataset_identity(dataset, chosen)["fingerprint"] == dataset._fingerprint
        assert dataset_identity(iter([]), chosen)["kind"] == "iterable"
        sources: list[object] = [path, folder, dataset, []]
        for source in sources:
            assert canonical_json(dataset_identity(source, chosen))
