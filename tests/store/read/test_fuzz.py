"""After any change to any file, a reader gets what was written or one of our errors, even if checksums fit."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residua.store.base.canonical import digest_of
from residua.store.base.errors import ResiduaError
from residua.store.encoding.shard import shard_path
from residua.store.format.archive_metadata import read_metadata
from residua.store.read.archive import Archive
from residua.store.read.summary import summarise
from residua.store.verification.verify import verify
from tests.store.base.test_canonical import VALUES
from tests.store.forging import (
    in_a_row,
    load,
    no_more_memory,
    places,
    sign_array,
    sign_commit,
    sign_root,
    sign_shard,
    sign_sidecar,
)
from tests.store.small_archive import HEIGHT, files_of, is_same_json, make_archive, read_everything

CODECS = ("raw", "fast", "small", "int8-block32", "bitround10")
SITE = "resid_post.0"
NUMBERS = st.sampled_from([-1, 0, 1, 2**31, 2**48, 2**63, 2**64, 10**400, 1.5, 1e300, True])
TEXTS = st.sampled_from(["", "..", "/etc/passwd", "bfloat16", "int8", "raw", "int8-block32", "\0", "x" * 5000])


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {codec: make_archive(tmp_path_factory.mktemp(codec) / "a.zarr", codec) for codec in CODECS}


@pytest.fixture(scope="module")
def expected(archives: dict[str, Path]) -> dict[str, dict[str, object]]:
    return {codec: read_everything(path) for codec, path in archives.items()}


def changed(data: st.DataObject, content: bytes, others: list[bytes]) -> bytes:
    """Return `content` after one change of any kind, or the content of another file."""
    at = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.integers(at, min(len(content), at + 64)))
    new = data.draw(st.binary(max_size=8) | st.just(content[at:stop][::-1]) | st.just(b"0" * (stop - at)))
    other = st.sampled_from([content[:at], content[at:], content * 2, b"", *others])
    return data.draw(st.just(content[:at] + new + content[stop:]) | other)


@settings(max_examples=80)
@given(data=st.data(), codec=st.sampled_from(CODECS))
def test_a_changed_file_gives_what_was_written_or_an_error(
    data: st.DataObject, codec: str, archives: dict[str, Path], expected: dict[str, dict[str, object]]
) -> None:
    archive = archives[codec]
    names = files_of(archive)
    name = data.draw(st.sampled_from(names))
    content = (archive / name).read_bytes()
    # A complete shard in another's place is what `residua verify` is for: its checksums are right.
    others = [(archive / other).read_bytes() for other in names if Path(other).suffix and Path(name).suffix]
    new = changed(data, content, others)
    try:
        (archive / name).write_bytes(new)
        for what, value in read_everything(archive).items():
            if not isinstance(value, Exception):
                assert value == expected[codec][what] or what == "progress", f"{what} changed silently"
        assert verify(archive).problems or is_same_json(content, new) or new == content
    finally:
        (archive / name).write_bytes(content)


def write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document))


def json_files(archive: Path) -> dict[str, Callable[[Path, Any], None]]:
    """Return, for a JSON file of each kind, what signs it after a change."""
    return {
        "zarr.json": lambda path, document: sign_root(path.parent, document),
        "sites/q/1/zarr.json": sign_array,
        "rows/token/zarr.json": sign_array,
        "commits/00000001-0000.json": lambda path, document: sign_commit(path, document["record"]),
        "sites/zarr.json": write_json,
    }


@settings(max_examples=120)
@given(data=st.data(), codec=st.sampled_from(CODECS))
def test_signed_metadata_of_any_make_are_read_or_refused(
    data: st.DataObject, codec: str, archives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    archive = Path(shutil.copytree(archives[codec], tmp_path_factory.mktemp("signed") / "a.zarr"))
    name, sign = data.draw(st.sampled_from(sorted(json_files(archive).items(), key=lambda item: item[0])))
    document = load(archive / name)
    container, key = data.draw(st.sampled_from(list(places(document))))
    if data.draw(st.booleans()):
        container[key] = data.draw(VALUES | NUMBERS | TEXTS | st.just(copy.deepcopy(document)))
    else:
        del container[key]
    try:
        sign(archive / name, document)
    except (KeyError, TypeError, AttributeError):
        write_json(archive / name, document)  # it has no place for a signature any more
    with no_more_memory():
        found = read_everything(archive)
        report = verify(archive)
        if not isinstance(found.get("open"), Exception) and not isinstance(found["progress"], Exception):
            summarise_or_refuse(archive)
    for value in found.values():
        if isinstance(value, Exception):
            assert len(str(value)) < 20_000
    assert report.n_bytes >= 0


def summarise_or_refuse(archive: Path) -> None:
    try:
        json.dumps(summarise(Archive(archive)).to_json())
    except ResiduaError:
        return


@settings(max_examples=80)
@given(data=st.data(), codec=st.sampled_from(CODECS))
def test_signed_chunks_of_any_bytes_are_decoded_or_refused(
    data: st.DataObject, codec: str, archives: dict[str, Path], expected: dict[str, dict[str, object]]
) -> None:
    archive = archives[codec]
    spec = data.draw(st.sampled_from(read_metadata(archive).plan.site(SITE).arrays(HEIGHT)))
    path = shard_path(archive, spec, 1)
    content = path.read_bytes()
    chunk = content[: -16 * spec.chunks_per_shard - 8]
    new = changed(data, chunk, [b"\0" * len(chunk)])
    try:
        sign_shard(path, [new], in_a_row([new]), spec.chunks_per_shard)
        with no_more_memory():
            found = read_everything(archive)
            report = verify(archive)
    finally:
        path.write_bytes(content)
    assert (new == chunk) == report.is_sound
    for what, value in found.items():
        if what not in (SITE, f"{SITE} backwards") and not what.startswith("example "):
            assert value == expected[codec][what], f"{what} has nothing to do with the chunk"
    if not isinstance(found[SITE], Exception):
        before, after = rows_of(expected[codec][SITE]), rows_of(found[SITE])
        assert before[:HEIGHT].tobytes() == after[:HEIGHT].tobytes()
        assert before[2 * HEIGHT :].tobytes() == after[2 * HEIGHT :].tobytes()


def rows_of(found: object) -> npt.NDArray[np.float32]:
    """Return the rows that `read_everything` found of the site."""
    assert isinstance(found, tuple)
    return np.frombuffer(found[2], np.float32).reshape(-1, 40)


@settings(max_examples=60)
@given(data=st.data())
def test_a_signed_tokenizer_of_any_make_is_used_or_refused(
    data: st.DataObject, archives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    archive = Path(shutil.copytree(archives["fast"], tmp_path_factory.mktemp("tokenizer") / "a.zarr"))
    name = "tokenizer/tokenizer.json"
    document = load(archive / name)
    container, key = data.draw(st.sampled_from([place for place in places(document) if place[0] is not None]))
    container[key] = data.draw(VALUES | NUMBERS | TEXTS)
    try:
        digest_of(document)
    except ValueError:
        return
    sign_sidecar(archive, name, json.dumps(document).encode())
    found = read_everything(archive)
    assert all(isinstance(found[f"text {row}"], str | Exception) for row in (0, 20))
