"""A damaged or hostile LM head: its parameters are loaded as written, or refused with an error of ours."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from residua.analysis.lens.lm_head import LMHead, load_lm_head
from residua.store.base.errors import DamagedArchiveError, ResiduaError, UnsafeArchiveError
from residua.store.format.sidecars import LMHeadSpec
from tests.lm_heads import save_lm_head
from tests.models.tiny import TINY
from tests.store.forging import little_memory
from tests.store.small_archive import make_archive

SPEC = json.loads(LMHeadSpec(norm="rms", eps=1e-6, dtype="float32").to_json())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive") / "head"
    save_lm_head(TINY["llama"](), folder)
    return folder


def head_or_error(folder: Path) -> LMHead | str:
    try:
        with little_memory():
            return load_lm_head(folder)
    except ResiduaError as error:
        return str(error)


@settings(max_examples=100)
@given(data=st.data(), name=st.sampled_from(["head.json", "head.safetensors"]))
def test_changed_files_are_read_or_refused(data: st.DataObject, name: str, folder: Path) -> None:
    content = (folder / name).read_bytes()
    at = data.draw(st.integers(0, min(400, len(content))))
    new = content[:at] + data.draw(st.binary(max_size=4)) + content[at + data.draw(st.integers(0, 4)) :]
    try:
        (folder / name).write_bytes(new)
        found = head_or_error(folder)
    finally:
        (folder / name).write_bytes(content)
    if isinstance(found, str):
        assert "head" in found
    else:
        assert (found.width, found.vocabulary_size) == (32, 97)
        assert found.logits(torch.zeros(1, 32, dtype=found.parameters["unembed.weight"].dtype)).shape == (1, 97)


def header(tensors: object, *, length: int | None = None) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    "content",
    [
        header({}),
        header({}, length=2**63),
        header({}, length=2**40),
        header({"unembed.weight": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}),
        header({"unembed.weight": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 4]}}) + b"\0" * 4,
        header({"unembed.weight": {"dtype": "F32", "shape": [-1, 4], "data_offsets": [0, 4]}}) + b"\0" * 4,
        header({"unembed.weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [4, 0]}}) + b"\0" * 4,
        header({"unembed.weight": {"dtype": "F32", "shape": [0, 0], "data_offsets": [0, 0]}}),
        header({"unembed.weight": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}) + b"\0" * 4,
        header({"../../x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}) + b"\0" * 4,
        b"[" * 10**5,
        b"",
    ],
    ids=range(12),
)
def test_hostile_parameters_are_refused_without_memory(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "head.json").write_text(json.dumps(SPEC))
    (tmp_path / "head.safetensors").write_bytes(content)
    assert str(tmp_path) in str(head_or_error(tmp_path))


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("eps", "true"),
        ("eps", "1" + "0" * 400),
        ("eps", "NaN"),
        ("softcap", '""'),
        ("softcap", "0"),
        ("softcap", "[]"),
        ("norm", "[]"),
        ("activation", '"__import__"'),
        ("dtype", "{}"),
        ("dtype", "[" * 10**5),
    ],
)
def test_a_hostile_description_is_refused(field: str, text: str) -> None:
    document = json.dumps({**SPEC, field: "HERE"}).replace('"HERE"', text)
    with pytest.raises(UnsafeArchiveError, match=r"head\.json"):
        LMHeadSpec.from_json(document.encode())


def test_a_terabyte_of_nothing_is_not_read(folder: Path, tmp_path: Path) -> None:
    for name in ("head.json", "head.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for name in ("head.safetensors", "head.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**40)
        assert f"{tmp_path / name} has 1,099,511,627,776 bytes" in str(head_or_error(tmp_path))


@pytest.mark.parametrize("name", ["head.json", "head.safetensors"])
def test_a_flipped_bit_of_an_archives_head_is_noticed(name: str, tmp_path: Path) -> None:
    archive = make_archive(tmp_path / "a.zarr")
    assert load_lm_head(archive / "head").vocabulary_size == 5
    content = bytearray((archive / "head" / name).read_bytes())
    content[-3] ^= 1
    (archive / "head" / name).write_bytes(content)
    with pytest.raises(DamagedArchiveError, match=rf"{name} was altered"):
        load_lm_head(archive / "head")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int8])
def test_parameters_that_are_integers_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    save_lm_head(TINY["llama"](), tmp_path)
    stored = load_file(tmp_path / "head.safetensors")
    stored["unembed.weight"] = stored["unembed.weight"].to(dtype)
    save_file(stored, tmp_path / "head.safetensors")
    with pytest.raises(UnsafeArchiveError, match=r"unembed\.weight"):
        load_lm_head(tmp_path)
