"""Analysis and the loader over archives of the same rows that are opened as one, in this process and in workers."""

import numpy as np
import pytest

import residua
from residua.analysis.support.open_archives import location, opened
from residua.store.read.archive import Archive
from tests.analysis.rows_archive import write_rows

LENGTHS = [5] * 24
RNG = np.random.default_rng(0)
VALUES = {site: RNG.standard_normal((120, 4)).astype(np.float32) for site in ("resid_post.0", "mlp_out.1")}
IDS = [RNG.integers(0, 50, 5).tolist() for _ in LENGTHS]


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    folder, columns = tmp_path_factory.mktemp("joined"), {"kind": ["a", "b"] * 12}
    paths = []
    for (site, values), height in zip(VALUES.items(), (32, 64), strict=True):
        paths.append(folder / f"{site}.zarr")
        write_rows(paths[-1], LENGTHS, {site: values}, columns=columns, input_ids=IDS, rows_per_shard=height)
    return residua.open(paths)


def test_batches_have_sites_of_both(joined: Archive) -> None:
    found = {site: np.zeros((120, 4), np.float32) for site in VALUES}
    for batch in joined.loader(list(VALUES), batch_size=16, seed=1):
        for site in VALUES:
            found[site][batch["row"].numpy()] = batch[site].numpy()
    for site, values in VALUES.items():
        np.testing.assert_array_equal(found[site], values)


def test_jobs_open_them_where_they_run(joined: Archive) -> None:
    again = opened(location(joined))
    assert again is opened(location(joined))
    assert again.sites == tuple(VALUES)
    site = "mlp_out.1"
    rows = residua.top(joined, site, channel=2, k=3)["row"].to_pylist()
    assert rows == np.argsort(-VALUES[site][:, 2])[:3].tolist()
    found = residua.direction(joined, 'kind == "b"', site=site)
    is_b = np.repeat(np.arange(24) % 2 == 1, 5)
    np.testing.assert_allclose(
        found,
        VALUES[site][is_b].mean(axis=0, dtype=np.float64) - VALUES[site][~is_b].mean(axis=0, dtype=np.float64),
        atol=1e-9,
    )
    assert residua.probe(joined, "kind").num_rows == 2
    np.testing.assert_array_equal(np.asarray(residua.analysis.array(joined, site)), VALUES[site])
