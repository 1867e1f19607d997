"""Directions by name, each compared with the array that it stands for; none is unpickled."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import residua
from residua.analysis.lens.checkpoint import LensConfig, Translator
from residua.analysis.lens.lens import TunedLens
from residua.analysis.lens.lm_head import load_lm_head
from residua.analysis.page.directions import directions_of
from residua.analysis.probes.files import SavedProbe, write_probe
from residua.store.base.errors import AnalysisError
from residua.store.read.archive import Archive
from tests.analysis.page.conftest import WIDTH, Made

RNG = np.random.default_rng(3)
MATRIX = RNG.standard_normal((9, WIDTH))


@pytest.fixture(scope="module")
def archive(made: Made) -> Archive:
    return residua.open(made.archive)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("directions")
    np.save(folder / "one.npy", MATRIX[2])
    np.save(folder / "rows.npy", MATRIX)
    np.savez(folder / "sae.npz", dec=MATRIX, enc=MATRIX.T.astype(np.float32))
    np.savez(folder / "single.npz", only=MATRIX[2])
    np.savez(folder / "pickled.npz", objects=np.array([{}], object))
    half = torch.from_numpy(MATRIX).bfloat16()
    save_file({"dec": half, "enc": half.T.contiguous(), "one": half[2].clone()}, folder / "sae.safetensors")
    write_probe(
        folder / "two",
        SavedProbe(MATRIX[:1], np.array([0.5]), 1.0, ["a", "b"], {"site": "resid_post.1", "target": "t"}),
    )
    write_probe(folder / "three", SavedProbe(MATRIX[:3], np.arange(3.0), 1.0, ["a", "b", "c"], {}))
    return folder


@pytest.mark.parametrize(
    ("what", "row", "exact"),
    [
        ("one.npy", 2, True),
        ("rows.npy#[4]", 4, True),
        ("sae.npz#dec[8]", 8, True),
        ("sae.npz#enc[:,3]", 3, False),
        ("single.npz", 2, True),
        ("sae.safetensors#dec[5]", 5, False),
        ("sae.safetensors#enc[:, 5]", 5, False),
        ("sae.safetensors#one", 2, False),
    ],
)
def test_files_give_the_vectors_that_numpy_saved(
    archive: Archive, folder: Path, what: str, row: int, exact: bool
) -> None:
    (found,) = directions_of(archive, [f"mine:=resid_post.1={folder}/{what}"], None)
    assert (found.name, found.site, found.bias) == ("mine", "resid_post.1", 0.0)
    np.testing.assert_allclose(np.asarray(found.vector), MATRIX[row], rtol=1e-15 if exact else 1e-2)


def test_a_saved_probe_is_its_vectors_with_their_biases(archive: Archive, folder: Path) -> None:
    (two,) = directions_of(archive, [str(folder / "two")], None)
    assert (two.site, two.bias) == ("resid_post.1", 0.5)
    np.testing.assert_array_equal(two.vector, MATRIX[0])
    three = directions_of(archive, [f"resid_post.0={folder / 'three'}"], None)
    assert [one.bias for one in three] == [0, 1, 2]
    assert len({one.name for one in three}) == 3
    np.testing.assert_array_equal([one.vector for one in three], MATRIX[:3])


def test_a_head_has_channels_of_its_own(archive: Archive) -> None:
    (found,) = directions_of(archive, ["q.1[3]=channel:5"], None)
    np.testing.assert_array_equal(np.flatnonzero(found.vector), [3 * 8 + 5])


@pytest.mark.parametrize("site", ["resid_post.0", "resid_post.1"])
def test_a_logit_through_a_tuned_lens_is_the_gradient_of_what_it_decodes(
    archive: Archive, site: str, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = {1: Translator(torch.randn(WIDTH, WIDTH, generator=generator), torch.randn(WIDTH, generator=generator))}
    config = LensConfig(base_model_name_or_path="none", d_model=WIDTH, num_hidden_layers=2)
    lens = TunedLens(load_lm_head(archive.head), maps, config)
    lens.save(tmp_path)
    hidden = torch.randn(WIDTH, generator=generator, requires_grad=True)
    (gradient,) = torch.autograd.grad(lens.decode(site, hidden[None])[0, 6], hidden)
    (found,) = directions_of(archive, [f"{site}=logit: plain"], tmp_path)
    np.testing.assert_allclose(np.asarray(found.vector), gradient.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("pickled.npz", "pickle|object"),
        ("sae.npz", "dec"),
        ("sae.npz#none[1]", "none"),
        ("sae.npz#dec[9]", "9"),
        ("sae.safetensors#enc[2]", ":,2"),
        ("sae.safetensors#dec[:,2]", "NUMBER"),
        ("sae.safetensors#dec[99]", "99"),
        ("sae.safetensors#dec", "9, 6"),
        ("rows.npy", "9, 6"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(archive: Archive, folder: Path, what: str, says: str) -> None:
    with pytest.raises(AnalysisError, match=says):
        directions_of(archive, [f"resid_post.1={folder}/{what}"], None)


def test_two_directions_of_one_name_are_told_apart_or_refused(archive: Archive) -> None:
    found = directions_of(archive, ["resid_post.0=channel:1", "resid_post.1=channel:1"], None)
    assert found[0].name != found[1].name
    with pytest.raises(AnalysisError, match="two directions"):
        directions_of(archive, ["resid_post.1=channel:1"] * 3, None)
