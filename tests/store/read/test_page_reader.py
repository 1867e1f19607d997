"""A reader made from `store/FORMAT.md` alone finds every activation and can check every digest."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs.blosc
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest

from residua.store.read.archive import Archive
from tests.store.small_archive import LENGTHS, make_archive


class PageReader:
    """Reads an archive with nothing but the page: no module of ours, and no Zarr."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.entry = json.loads((root / "zarr.json").read_bytes())["attributes"]["residua"]
        parts = sorted((root / "examples").iterdir())
        self.examples = [example for part in parts for example in pq.read_table(part).to_pylist()]

    def row_of(self, example: int, position: int) -> int:
        line = self.examples[example]
        return int(line["first_row"]) + list(line["positions"]).index(position)

    def read(self, node: str, row: int) -> npt.NDArray[np.generic]:
        meta = json.loads((self.root / node / "zarr.json").read_bytes())
        (sharding,) = meta["codecs"]
        height, row_shape = meta["chunk_grid"]["configuration"]["chunk_shape"][0], meta["shape"][1:]
        chunk_height = sharding["configuration"]["chunk_shape"][0]
        path = self.root / node / "c" / "/".join(map(str, [row // height, *[0] * len(row_shape)]))
        stored = path.read_bytes()
        n_chunks = height // chunk_height
        index = stored[-(16 * n_chunks + 4) :]
        assert google_crc32c.value(index[:-4]) == struct.unpack("<I", index[-4:])[0]
        offset, size = struct.unpack_from("<QQ", index, 16 * (row % height // chunk_height))
        chunk = stored[offset : offset + size]
        assert google_crc32c.value(chunk[:-4]) == struct.unpack("<I", chunk[-4:])[0]
        body = chunk[:-4]
        if "blosc" in [codec["name"] for codec in sharding["configuration"]["codecs"]]:
            body = numcodecs.blosc.decompress(body)
        dtype = np.dtype({"bfloat16": "<u2"}.get(meta["data_type"], meta["data_type"])).newbyteorder("<")
        rows: npt.NDArray[np.generic] = np.frombuffer(body, dtype).reshape(chunk_height, *row_shape)
        return rows[row % height % chunk_height, ...]

    def digest_of_shard(self, node: str, shard: int) -> str:
        meta = json.loads((self.root / node / "zarr.json").read_bytes())
        n_chunks = (
            meta["chunk_grid"]["configuration"]["chunk_shape"][0]
            // meta["codecs"][0]["configuration"]["chunk_shape"][0]
        )
        stored = (self.root / node / "c" / "/".join(map(str, [shard, *[0] * (len(meta["shape"]) - 1)]))).read_bytes()
        index = stored[-(16 * n_chunks + 4) :]
        ends = [offset + size for offset, size in struct.iter_unpack("<QQ", index[:-4]) if size != 2**64 - 1]
        return hashlib.sha256(index + b"".join(stored[end - 4 : end] for end in ends)).hexdigest()


@pytest.fixture(scope="module", params=["raw", "fast", "small"])
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PageReader:
    return PageReader(make_archive(tmp_path_factory.mktemp("made") / "a.zarr", request.param))


def test_the_page_suffices_to_find_every_activation(reader: PageReader) -> None:
    archive = Archive(reader.root)
    for example, length in enumerate(LENGTHS):
        for position in range(length):
            row = reader.row_of(example, position)
            for site, node in (("resid_post.0", "sites/resid_post/0"), ("q.1", "sites/q/1")):
                assert np.array_equal(reader.read(node, row), archive[site][row])
            assert reader.read("rows/example", row) == example
            assert reader.read("rows/position", row) == position
            assert reader.read("rows/token", row) == reader.examples[example]["input_ids"][position]


def test_the_page_suffices_to_check_every_digest(reader: PageReader) -> None:
    def sha256(value: Any) -> str:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    entry = reader.entry
    assert entry["digest"] == sha256(entry["plan"])
    assert entry["sha256"] == sha256({key: value for key, value in entry.items() if key != "sha256"})
    for name, digest in entry["files"].items():
        assert hashlib.sha256((reader.root / name).read_bytes()).hexdigest() == digest
    content = hashlib.sha256()
    for line in reader.examples:
        content.update(struct.pack("<qq", line["n_tokens"], line["n_rows"]))
        content.update(np.array(line["input_ids"], "<i4").tobytes() + np.array(line["positions"], "<i4").tobytes())
    assert entry["plan"]["dataset"]["digest"] == content.hexdigest()
    for path in sorted((reader.root / "commits").iterdir()):
        commit = json.loads(path.read_bytes())
        assert commit["sha256"] == sha256(commit["record"])
        assert commit["record"]["plan"] == entry["digest"]
        for node, file in commit["record"]["arrays"].items():
            assert file["digest"] == reader.digest_of_shard(node, commit["record"]["shard"])
            attributes = json.loads((reader.root / node / "zarr.json").read_bytes())
            ours = attributes["attributes"]["residua"]
            signed = {**attributes, "attributes": {key: ours[key] for key in ours if key != "sha256"}}
            assert ours["sha256"] == sha256(signed)
