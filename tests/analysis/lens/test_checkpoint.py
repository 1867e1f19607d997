"""Lenses are exchanged with the tuned-lens package: each loads the other's files, and decodes alike."""

import ctypes
import json
import pickle
import re
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from tuned_lens.nn.lenses import TunedLens as TheirLens
from tuned_lens.nn.unembed import Unembed

from residua.analysis.lens.checkpoint import (
    LensConfig,
    Translator,
    hash_unembedding,
    read_checkpoint,
    read_tensors,
    write_checkpoint,
    write_tensors,
)
from residua.analysis.lens.evaluate import REPORT
from residua.analysis.lens.lens import TunedLens
from residua.store.base.errors import AnalysisError
from tests.lm_heads import save_lm_head
from tests.models.tiny import TINY

LAYERS, WIDTH = 3, 32


def model_of(name: str) -> PreTrainedModel:
    model = TINY[name]()
    model.config.name_or_path = f"tiny/{name}"  # as if loaded from a checkpoint
    return model


def translators() -> dict[int, Translator]:
    generator = torch.Generator().manual_seed(0)
    return {
        layer: Translator(torch.randn(WIDTH, WIDTH, generator=generator), torch.randn(WIDTH, generator=generator))
        for layer in range(LAYERS)
    }


def written(folder: Path, model: PreTrainedModel, chosen: dict[int, Translator]) -> None:
    weight = model.get_output_embeddings().weight  # type: ignore[no-untyped-call]  # theirs
    config = LensConfig(
        base_model_name_or_path="tiny/model",
        d_model=WIDTH,
        num_hidden_layers=LAYERS,
        unembed_hash=hash_unembedding(weight),
    )
    write_checkpoint(folder, config, chosen)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt"])
def test_theirs_loads_ours(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, chosen = model_of(name), translators()
    written(tmp_path, model, {layer: chosen[layer] for layer in (0, 2)})
    theirs = TheirLens.from_unembed_and_pretrained(Unembed(model), str(tmp_path))
    hidden = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    for layer in (0, 2):
        torch.testing.assert_close(theirs.transform_hidden(hidden, layer), chosen[layer](hidden), rtol=1e-5, atol=1e-5)
    assert torch.equal(theirs.transform_hidden(hidden, 1), hidden)
    assert theirs.config.unembed_hash == json.loads((tmp_path / "config.json").read_text())["unembed_hash"]
    assert "hash" not in capsys.readouterr().err
    save_lm_head(model, tmp_path / "head")
    ours = TunedLens.load(tmp_path)
    torch.testing.assert_close(ours.decode("resid_pre.2", hidden), theirs(hidden, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ours_loads_theirs(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    theirs = TheirLens.from_model(model)
    with torch.no_grad():
        for parameter in theirs.layer_translators.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(2))
    theirs.save(tmp_path / "lens")
    save_lm_head(model, tmp_path / "head")
    ours = TunedLens.load(tmp_path / "lens", head=tmp_path / "head")
    hidden = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    for layer in range(LAYERS):
        found = ours.decode(f"resid_pre.{layer}", hidden)
        torch.testing.assert_close(found, theirs(hidden, layer), rtol=1e-4, atol=1e-4)
    ours.save(tmp_path / "again")
    again = TheirLens.from_unembed_and_pretrained(Unembed(model), str(tmp_path / "again"))
    for mine, before in zip(again.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, before, rtol=1e-6, atol=1e-6)
    assert load_file(tmp_path / "again" / "head" / "head.safetensors").keys() == ours.head.parameters.keys()


def test_a_lens_of_another_model_is_refused(tmp_path: Path) -> None:
    model = model_of("llama")
    written(tmp_path, model, translators())
    save_lm_head(model_of("mistral"), tmp_path / "head")
    with torch.no_grad():
        model.get_output_embeddings().weight.neg_()  # type: ignore[no-untyped-call]  # theirs
    save_lm_head(model, tmp_path / "other")
    with pytest.raises(AnalysisError, match=f"unembedding.*{tmp_path / 'other'}"):
        TunedLens.load(tmp_path, head=tmp_path / "other")


class _Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("opened a strange file",)


@pytest.mark.parametrize("content", ["bomb", "cut", "missing", "word", "whole"])
def test_a_strange_checkpoint_is_refused_and_nothing_in_it_runs(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, model_of("llama"), translators())
    path = tmp_path / "params.pt"
    if content == "bomb":
        path.write_bytes(pickle.dumps(_Bomb(), protocol=2))
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:900])
    elif content == "missing":
        path.unlink()
    elif content == "word":
        _replace_in_pickle(path, b"\x89c", b"c")
    if content == "whole":
        assert read_checkpoint(tmp_path)[0].d_model == WIDTH
        return
    with pytest.raises(AnalysisError, match=r"params\.pt"):
        read_checkpoint(tmp_path)
    assert "opened" not in capsys.readouterr().out


def _replace_in_pickle(path: Path, old: bytes, new: bytes) -> None:
    """Write a checkpoint again with another pickle in it."""
    with ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with ZipFile(path, "w") as file:
        for name, content in parts.items():
            file.writestr(name, content.replace(old, new) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize("compression", [ZIP_STORED, ZIP_DEFLATED])
def test_a_checkpoint_that_unpacks_to_more_is_refused_before_it_is_read(
    compression: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compressed member is refused for itself, one that is not for its size."""
    written(tmp_path, model_of("llama"), translators())
    path = tmp_path / "params.pt"
    size = 2**10 if compression == ZIP_DEFLATED else 2**25
    with ZipFile(path, "a", compression) as file:
        file.writestr("archive/data/99", bytes(size))
    monkeypatch.delattr(torch, "load")
    with pytest.raises(AnalysisError, match=r"params\.pt is compressed, or unpacks from .* 3 blocks of width 32"):
        read_checkpoint(tmp_path)


def test_one_matrix_under_several_names_is_refused(tmp_path: Path) -> None:
    """A small file would become as many matrices as it has names."""
    chosen = translators()
    written(tmp_path, model_of("llama"), chosen)
    path = tmp_path / "params.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "1.weight": state["0.weight"], "2.weight": state["0.weight"].T}, path)
    with pytest.raises(AnalysisError, match=r"params\.pt .*1\.weight"):
        read_checkpoint(tmp_path)


def test_layers_without_a_map_take_room_once(tmp_path: Path) -> None:
    """On the disk, and in memory when they are read again."""
    config = LensConfig(base_model_name_or_path="tiny/model", d_model=256, num_hidden_layers=64)
    chosen = Translator(torch.randn(256, 256), torch.randn(256))
    write_checkpoint(tmp_path, config, {5: chosen})
    assert (tmp_path / "params.pt").stat().st_size < 3 * 256 * 256 * 4
    assert {path.name for path in tmp_path.iterdir()} == {"params.pt", "config.json"}
    _, found = read_checkpoint(tmp_path)
    assert len({translator.weight.data_ptr() for translator in found.values()}) == 2
    torch.testing.assert_close(found[5].weight, chosen.weight)
    assert torch.equal(found[6].weight, torch.eye(256))


@pytest.mark.parametrize(
    "change",
    [
        {"1.bias": torch.zeros(7)},
        {"3.bias": torch.zeros(WIDTH)},
        {"1.weight": torch.zeros(1).expand(WIDTH, WIDTH)},  # one number that claims to be a matrix
        {"1.weight": torch.zeros(WIDTH, WIDTH, device="meta")},
        {"1.weight": torch.zeros(WIDTH, WIDTH).to_sparse()},
    ],
)
def test_tensors_that_are_no_lens_are_refused(change: dict[str, torch.Tensor], tmp_path: Path) -> None:
    written(tmp_path, model_of("llama"), translators())
    path = tmp_path / "params.pt"
    torch.save({**torch.load(path, weights_only=True), **change}, path)
    with pytest.raises(AnalysisError, match=r"params\.pt .* 3 blocks of width 32"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("residua.json", b'{"depths": 7}'),
        ("residua.json", b"[" * 100_000),
        ("report.parquet", b"PAR1"),
        ("report.parquet", {"depth": [1]}),
        ("report.parquet", {name: ["x"] for name in REPORT.names}),
        ("report.parquet", {name: [] for name in REPORT.names}),
    ],
)
def test_strange_files_next_to_the_checkpoint_are_refused(name: str, content: Any, tmp_path: Path) -> None:
    model = model_of("llama")
    written(tmp_path, model, translators())
    save_lm_head(model, tmp_path / "head")
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        pq.write_table(pa.table(content), tmp_path / name)
    with pytest.raises(AnalysisError, match=re.escape(name)):
        TunedLens.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        "[" * 100_000,
        {"d_model": -1},
        {"num_hidden_layers": 1e9},
        {"num_hidden_layers": 5000},
        {"lens_type": "other"},
        {"d_model": True},
        None,
    ],
)
def test_a_strange_config_is_refused(change: dict[str, object] | str | None, tmp_path: Path) -> None:
    written(tmp_path, model_of("llama"), translators())
    path = tmp_path / "config.json"
    if isinstance(change, dict):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    else:
        path.write_text(change or "[]")
    with pytest.raises(AnalysisError, match=r"config\.json"):
        read_checkpoint(tmp_path)


def test_the_memory_of_each_tensor_of_unmapped_files_goes_with_it(tmp_path: Path) -> None:
    """Of a mapped file, changed pages stay until the last tensor is gone."""

    def allocated() -> int:
        ctypes.CDLL(None).malloc_trim(0)  # else what malloc keeps for later counts
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    write_tensors(tmp_path / "sums", {"large": torch.ones(2**24, dtype=torch.float64), "n": torch.tensor(3.0)})
    found = read_tensors(tmp_path / "sums", is_mapped=False)
    large, before = found["large"].add_(1), allocated()
    assert (large[-1].item(), found["n"].item()) == (2, 3)
    large.data = large.new_empty(0)  # although others have it
    assert allocated() < before - 64 * 2**20, "half of the tensor: other threads of this process may allocate meanwhile"


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_mean_of_maps_is_that_of_float64(n: int) -> None:
    rng = np.random.default_rng(n)
    weights, biases = rng.normal(size=(n, 6, 6)).astype(np.float32), rng.normal(size=(n, 6)).astype(np.float32)
    maps = [Translator(torch.from_numpy(w), torch.from_numpy(b)) for w, b in zip(weights, biases, strict=True)]
    found = Translator.mean(maps)
    np.testing.assert_array_equal(found.weight.numpy(), weights.astype(np.float64).mean(0).astype(np.float32))
    np.testing.assert_array_equal(found.bias.numpy(), biases.astype(np.float64).mean(0).astype(np.float32))
    np.testing.assert_array_equal(maps[0].weight.numpy(), weights[0])  # not changed in place
    assert (found.weight is maps[0].weight) == (n == 1), "the map of a layer that has no parts is not copied"
