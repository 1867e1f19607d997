"""Batches that are scaled, standardised, whitened, cast and moved, compared with numpy in float64."""

import json
import pickle
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from residua.analysis.loader.normalisation import Normalisation
from residua.store.base.errors import AnalysisError
from residua.store.read.archive import Archive
from tests.analysis.rows_archive import write_rows

LENGTH, N_EXAMPLES = 20, 60
N_ROWS = LENGTH * N_EXAMPLES
SITES = ["resid_post.0", "mlp_out.0", "q.0"]


def made() -> dict[str, npt.NDArray[np.float32]]:
    """Return values of sites: one has a constant channel, one heads; rows at position 0 are 1000 times as long."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(6, 6))
    found = {
        "resid_post.0": rng.normal(size=(N_ROWS, 6)) @ mixing + 5,
        "mlp_out.0": rng.normal(size=(N_ROWS, 4)) * [1e-3, 1, 1e3, 0] + [0, 0, 0, 2],
        "q.0": rng.normal(size=(N_ROWS, 2, 3)),
    }
    for values in found.values():
        values[::LENGTH] *= 1000
    found["resid_post.0"][5] = np.nan
    return {site: values.astype(np.float32) for site, values in found.items()}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return write_rows(tmp_path_factory.mktemp("norm") / "a.zarr", [LENGTH] * N_EXAMPLES, made(), codec="raw")


def expected(kind: str, values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return what numpy makes of rows, (rows, width)."""
    rows = values.astype(np.float64)
    used = rows[np.isfinite(rows).all(axis=1)]
    if kind == "mean_norm":
        return np.asarray(rows * (rows.shape[1] ** 0.5 / np.sqrt((used**2).sum(axis=1)).mean()))
    deviation = used.std(axis=0)
    return np.asarray((rows - used.mean(axis=0)) / np.where(deviation > 0, deviation, 1))


@pytest.mark.parametrize("kind", ["mean_norm", "standardise"])
@pytest.mark.parametrize("site", SITES)
def test_values_are_as_numpy_scales_them(archive: Archive, kind: Any, site: str) -> None:
    chosen = np.flatnonzero(np.arange(N_ROWS) % LENGTH > 0)
    (batch,) = archive.loader(site, batch_size=N_ROWS, normalise=kind, where="position > 0")
    rows = np.argsort(batch["row"].numpy())
    found = batch[site].numpy()[rows].reshape(len(chosen), -1)
    raw = archive[site][chosen].reshape(len(chosen), -1)
    assert batch[site].dtype == torch.float32
    np.testing.assert_allclose(found, expected(kind, raw), rtol=2e-5, atol=1e-5)
    finite = found[np.isfinite(found).all(axis=1)].astype(np.float64)
    if kind == "mean_norm":
        assert np.linalg.norm(finite, axis=1).mean() == pytest.approx(raw.shape[1] ** 0.5, rel=1e-6)


def test_whitened_rows_have_the_identity_as_covariance(archive: Archive) -> None:
    loader = archive.loader("resid_post.0", batch_size=N_ROWS, normalise="whiten", where="position > 5")
    (batch,) = loader
    rows = batch["resid_post.0"].numpy().astype(np.float64)
    assert np.abs(rows.mean(axis=0)).max() < 1e-5
    eigenvalues = np.linalg.eigvalsh(np.cov(rows.T, bias=True))
    raw = np.asarray(archive["resid_post.0"].numpy(batch["row"].numpy()), np.float64)
    of_raw = np.linalg.eigvalsh(np.cov(raw.T, bias=True))
    shrunk = of_raw / (of_raw + 1e-3 * of_raw.mean())
    np.testing.assert_allclose(eigenvalues, np.sort(shrunk), rtol=1e-4)
    undone = loader.normalisation["resid_post.0"].undo(batch["resid_post.0"])
    np.testing.assert_allclose(undone.numpy(), raw, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["mean_norm", "standardise", "whiten"])
def test_constants_can_be_folded_into_weights(archive: Archive, kind: Any) -> None:
    """An encoder of normalised rows is an encoder of raw rows with other weights."""
    loader = archive.loader("resid_post.0", batch_size=50, normalise=kind, where="position > 5")
    constants = loader.normalisation["resid_post.0"]
    weight = torch.randn(6, 9, dtype=torch.float64)
    factor = constants.factor if constants.factor.ndim == 2 else torch.diag(constants.factor.expand(6))
    folded, bias = factor @ weight, -constants.mean @ factor @ weight
    for batch in loader:
        raw = torch.from_numpy(archive["resid_post.0"].numpy(batch["row"].numpy(), dtype=np.float64))
        torch.testing.assert_close(raw @ folded + bias, batch["resid_post.0"].double() @ weight, rtol=1e-4, atol=1e-3)


def test_constants_are_the_same_for_all_ranks_after_a_stop_and_for_evaluation(archive: Archive) -> None:
    settings: Any = {"batch_size": 64, "where": "position > 0", "dtype": torch.bfloat16}
    loaders = [archive.loader(SITES, normalise="mean_norm", rank=rank, world_size=2, **settings) for rank in range(2)]
    factors = [[loader.normalisation[site].factor.item() for site in SITES] for loader in loaders]
    assert factors[0] == factors[1]
    batch = next(iter(pickle.loads(pickle.dumps(loaders[0]))))  # noqa: S301  # our own
    assert {batch[site].dtype for site in SITES} == {torch.bfloat16}
    state = json.loads(json.dumps(loaders[0].state_dict()))
    with pytest.raises(AnalysisError, match=r"normalise was .*mean_norm"):
        archive.loader(SITES, normalise="whiten", rank=0, world_size=2, **settings).load_state_dict(state)
    held_out = archive.loader(SITES, normalise=loaders[0].normalisation, split="test", **settings)
    batch = next(iter(held_out))
    raw = archive["q.0"].torch(batch["row"].numpy())
    assert torch.equal(batch["q.0"], loaders[0].normalisation["q.0"].apply(raw).bfloat16())


def test_what_cannot_be_normalised_is_refused(archive: Archive, tmp_path: Any) -> None:
    unknown: Any = "norm"
    with pytest.raises(AnalysisError, match=r"'norm'.*mean_norm, standardise, whiten"):
        archive.loader(SITES, batch_size=8, normalise=unknown)
    one: dict[str, Normalisation] = archive.loader("q.0", batch_size=8, normalise="whiten").normalisation
    with pytest.raises(AnalysisError, match=r"no constants for mlp_out\.0"):
        archive.loader(["q.0", "mlp_out.0"], batch_size=8, normalise=one)
    none = write_rows(tmp_path / "a.zarr", [4], {"z.0": np.full((4, 2), np.inf, np.float32)})
    with pytest.raises(AnalysisError, match=r"z\.0 cannot be normalised.*0 are finite"):
        none.loader("z.0", batch_size=2, normalise="standardise")


def test_batches_lie_on_the_device_that_is_named(archive: Archive) -> None:
    plain = archive.loader("q.0", batch_size=64)
    for moved, batch in zip(archive.loader("q.0", batch_size=64, device="cpu"), plain, strict=True):
        assert torch.equal(moved["q.0"], batch["q.0"])
    assert next(iter(archive.loader("q.0", batch_size=64, device="meta")))["q.0"].is_meta
    with pytest.raises(AnalysisError, match="'gpu'"):
        archive.loader("q.0", batch_size=64, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(AnalysisError, match=r"'cuda:0'.*finds 0"):
            archive.loader("q.0", batch_size=64, device="cuda:0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: pinned copies are not tested")
def test_on_cuda_batches_are_copied_ahead(archive: Archive) -> None:
    loader = archive.loader("q.0", batch_size=64, device="cuda", epochs=3)
    begun = iter(loader)
    first = next(begun)
    assert loader.state_dict()["taken"] == 1  # what was read ahead is not counted
    for moved, batch in zip([first, *begun], archive.loader("q.0", batch_size=64, epochs=3), strict=True):
        assert torch.equal(moved["q.0"].cpu(), batch["q.0"])
