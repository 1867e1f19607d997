"""Edits as data: they are read as they were written, and untrusted input is never executed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from residua.store.base.canonical import canonical_json
from residua.store.base.errors import PlanError
from residua.store.edits.edit import KINDS, Add, Edit
from residua.store.edits.parser import is_reproducible, parse_edits

ONE_OF_EACH: list[dict[str, Any]] = [
    {"edit": "zero", "site": "mlp_out.3", "where": {"label": ["a", None, 1.5]}, "tokens": [4]},
    {"edit": "mean", "site": ["resid_post.*", "final"], "column": "label", "rows": [7, 8]},
    {"edit": "add", "site": "resid_post.5", "vector": [1.0, -0.5], "scale": 4.0, "positions": [-1, 3]},
    {"edit": "set", "site": "resid_post.5", "to": "stored", "positions": "-3:"},
    {"edit": "set", "site": "resid_post.5", "to": 0.25},
    {"edit": "scale", "site": "z.1", "by": 0.5, "heads": [0, 2], "channels": [1]},
    {"edit": "project_out", "site": "resid_post.5", "directions": [[1.0, 2.0], [0.0, 1.0]]},
    {"edit": "noise", "site": "resid_post.5", "std": 0.1, "seed": 3},
    {"edit": "swap", "site": "resid_post.5", "source": {"3": 4}, "align": [[1, 2]]},
    {"edit": "lens", "site": "resid_post.5", "lens": "lens"},
    {"edit": "overlay", "site": "resid_post.5", "overlay": "overlay.zarr", "examples": [1]},
]


def canonical(edits: tuple[Edit, ...]) -> bytes:
    return canonical_json([edit.to_json() for edit in edits])


def test_every_kind_is_tested() -> None:
    assert {edit["edit"] for edit in ONE_OF_EACH} == KINDS.keys() - {"function"}


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_file_and_python_give_the_same_edits_and_json_restores_them(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"edits.{suffix}"
    path.write_text(json.dumps({"edits": ONE_OF_EACH} if suffix == "yaml" else ONE_OF_EACH))
    edits = parse_edits(path)
    assert canonical(parse_edits(ONE_OF_EACH, folder=tmp_path)) == canonical(edits)
    again = json.loads(canonical(edits))
    assert canonical(parse_edits(again, folder=tmp_path)) == canonical(edits)
    assert [edit["edit"] for edit in again] == [edit["edit"] for edit in ONE_OF_EACH]
    for edit, given in zip(again, ONE_OF_EACH, strict=True):
        assert {key: edit[key] for key in given if key not in ("site", "lens", "overlay")} == {
            key: value for key, value in given.items() if key not in ("site", "lens", "overlay")
        }


def test_vectors_come_from_lists_arrays_tensors_and_files_in_the_folder(tmp_path: Path) -> None:
    values = np.arange(4, dtype=np.float32) / 2
    np.save(tmp_path / "v.npy", values)
    save_file({"a": torch.from_numpy(values).bfloat16(), "b": torch.zeros(4)}, tmp_path / "v.safetensors")
    given: list[object] = [values.tolist(), values, torch.from_numpy(values).bfloat16(), "v.npy", "v.safetensors#a"]
    base = {"edit": "add", "site": "final"}
    edits = parse_edits([{**base, "vector": vector} for vector in given], folder=tmp_path)
    for edit in edits:
        assert isinstance(edit, Add)
        np.testing.assert_array_equal(edit.vector.values, values)
    named = json.loads(canonical(edits))[3]["vector"]
    assert named["file"] == "v.npy"
    np.save(tmp_path / "v.npy", values + 1)
    with pytest.raises(PlanError, match=r"'v\.npy' is not the file that the edit was made with"):
        parse_edits([{**base, "vector": named}], folder=tmp_path)


def test_a_function_is_taken_from_python_only_and_marked(tmp_path: Path) -> None:
    (edit,) = parse_edits([{"edit": "function", "site": "final", "function": abs}])
    assert not is_reproducible([edit])
    said = edit.to_json()
    assert said == {"edit": "function", "site": ["final"], "function": "builtins.abs", "reproducible": False}
    (tmp_path / "edits.json").write_text(json.dumps([{**said, "reproducible": None}]))
    with pytest.raises(PlanError, match="knows no 'reproducible'"):
        parse_edits(tmp_path / "edits.json")
    (tmp_path / "edits.json").write_text('[{"edit": "function", "site": "final", "function": "os.system"}]')
    with pytest.raises(PlanError, match="only Python code in this process"):
        parse_edits(tmp_path / "edits.json")


ADD = {"edit": "add", "site": "final", "vector": [1.0]}
HOSTILE: list[tuple[object, str]] = [
    ("zero", r"edit 1: an edit is a mapping"),
    ({"edit": "zap", "site": "final"}, "there is no edit 'zap'; there are zero, mean"),
    ({"site": "final"}, "there is no edit 'None'"),
    ({"edit": "zero"}, "zero needs site"),
    ({"edit": "add", "site": "final"}, r"edit 1 \(add at final\): add needs vector"),
    ({**ADD, "vektor": 1}, "add knows no 'vektor': did you mean 'vector'"),
    ({**ADD, "by": 1}, "add knows no 'by'"),
    ({**ADD, "site": []}, "site is the name of a site"),
    ({**ADD, "site": {"final": 1}}, "site is the name of a site"),
    ({**ADD, "scale": float("nan")}, "scale is a finite number"),
    ({**ADD, "scale": True}, "scale is a finite number"),
    ({**ADD, "vector": []}, "should be a vector of numbers"),
    ({**ADD, "vector": [1, "2"]}, "should be a vector of numbers"),
    ({**ADD, "vector": [[1], [2, 3]]}, "a vector is a list of numbers"),
    ({**ADD, "vector": [float("inf")]}, "NaN or infinite"),
    ({**ADD, "vector": "../secret.npy"}, r"'\.\./secret\.npy' leads out of"),
    ({**ADD, "vector": "/etc/passwd"}, "'/etc/passwd' leads out of"),
    ({**ADD, "vector": "link.npy"}, r"'link\.npy' leads out of"),
    ({**ADD, "vector": "nul\0.npy"}, "is not the name of a file"),
    ({**ADD, "vector": "none.npy"}, r"there is no file 'none\.npy'"),
    ({**ADD, "vector": "pickle.npy"}, r"'pickle\.npy' cannot be read as a vector"),
    ({**ADD, "vector": "huge.npy"}, r"'huge\.npy' cannot be read as a vector"),
    ({**ADD, "vector": "larger.npy"}, r"'larger\.npy' cannot be read as a vector"),
    ({**ADD, "vector": "open.npy"}, r"'open\.npy' cannot be read as a vector"),
    ({**ADD, "vector": "zip.npy"}, r"'zip\.npy' cannot be read as a vector"),
    ({**ADD, "vector": "a" * 5000 + ".npy"}, "is not the name of a file"),
    ({**ADD, "scale": 10**400}, "scale is a finite number"),
    ({"edit": "swap", "site": "final", "source": {float("inf"): 1}}, r"edit 1 \(swap at final\)"),
    ({**ADD, "vector": "text.txt"}, r"neither \.npy nor \.safetensors"),
    ({**ADD, "vector": "broken.safetensors"}, "cannot be read as a vector"),
    ({**ADD, "vector": "two.safetensors"}, "holds a, b: name one as FILE#NAME"),
    ({**ADD, "vector": {"file": "two.safetensors"}}, "a vector in a file is written as its name"),
    ({**ADD, "positions": "a:b"}, "is not a slice"),
    ({**ADD, "positions": []}, "positions is a list of whole numbers"),
    ({**ADD, "positions": [0.5]}, "positions .*whole number"),
    ({**ADD, "examples": [-1]}, "examples is a whole number from 0 on"),
    ({**ADD, "rows": [10**30]}, "rows is a whole number from 0 on"),
    ({**ADD, "where": {"label": {"a": 1}}}, "the values of 'label' are plain"),
    ({"edit": "noise", "site": "final", "std": -1}, "the spread of noise is at least 0"),
    ({"edit": "swap", "site": "final", "source": 1, "align": "middle"}, "align is start, end, or a list of pairs"),
    ({"edit": "swap", "site": "final", "source": {"a": 1}}, "edit 1"),
    ({"edit": "swap", "site": "final", "source": {1.5: 1}}, "source is a whole number from 0 on, found '1.5'"),
    ({"edit": "swap", "site": "final", "source": 1, "align": [[2, 0], [2, 1]]}, "gives a position two partners"),
    ({"edit": "overlay", "site": "final", "overlay": "/"}, "leads out of"),
]


@pytest.mark.parametrize("case", range(len(HOSTILE)))
def test_what_is_no_edit_is_refused(case: int, tmp_path: Path) -> None:
    item, match = HOSTILE[case]
    folder = tmp_path / "edits"
    folder.mkdir()
    np.save(tmp_path / "secret.npy", np.zeros(1))
    (folder / "link.npy").symlink_to(tmp_path / "secret.npy")
    np.save(folder / "pickle.npy", np.array([{}], object))
    claim = b"{'descr': '<f8', 'fortran_order': False, 'shape': (%d,), }"
    for name, header in (("huge", claim % 10**12), ("larger", claim % 10**30), ("open", b"{'descr': (")):
        (folder / f"{name}.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with (folder / "zip.npy").open("wb") as file:
        np.savez(file, a=np.zeros(1))
    (folder / "text.txt").write_text("1")
    (folder / "broken.safetensors").write_bytes(b"\xff" * 32)
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, folder / "two.safetensors")
    with pytest.raises(PlanError, match=match):
        parse_edits([item], folder=folder)  # type: ignore[list-item]  # that is the test


FILES = {
    "no list": "a: 1",
    "an alias": "- &a {edit: zero, site: final}\n- *a",
    "a tag": "- !!python/object/apply:os.system [ls]",
    "no text": "\x00\x01",
    "too deep": "[" * 5000,
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_hold_no_edits(name: str, tmp_path: Path) -> None:
    path = tmp_path / "edits.yaml"
    path.write_text(FILES[name])
    with pytest.raises(PlanError, match=r"edits\.yaml"):
        parse_edits(path)
    path.write_text(json.dumps([{"edit": "zero", "site": "final"}] * 1001))
    with pytest.raises(PlanError, match="1,001 edits were given"):
        parse_edits(path)
    with pytest.raises(PlanError, match="there is no file of edits"):
        parse_edits(tmp_path / "none.yaml")


def test_a_file_that_would_take_gigabytes_to_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "edits.yaml"
    path.write_text("[" + "0," * 2**19 + "0]")
    with pytest.raises(PlanError, match=r"over 1 MiB: put long vectors into \.npy files"):
        parse_edits(path)


def test_a_path_object_may_lead_anywhere_and_text_may_not(tmp_path: Path) -> None:
    edit = {"edit": "overlay", "site": "final", "overlay": tmp_path / "o"}
    assert parse_edits([edit], folder=tmp_path / "else")
    with pytest.raises(PlanError, match="leads out of"):
        parse_edits([{**edit, "overlay": str(tmp_path / "o")}], folder=tmp_path / "else")
