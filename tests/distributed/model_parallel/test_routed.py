"""Routing, latents and mixers of models that two ranks hold together: the rows of one process, except for rounding."""

from pathlib import Path

import numpy as np
import pytest

from residua.store.read.archive import Archive
from residua.store.verification.verify import verify
from tests.distributed.model_parallel.routed_cases import SITES, captured
from tests.forking import ForkedWorkers, launched
from tests.models.registries import build

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def test_split_models_have_the_routing_of_one_process(forked_workers: ForkedWorkers, tmp_path: Path) -> None:
    for name in SITES:
        model = build("causal", name)
        model.save_pretrained(tmp_path / name)
        captured(model, name, tmp_path / f"{name}.zarr")
    ended = forked_workers.run(
        launched([str(tmp_path)], 2, module="tests.distributed.model_parallel.routed_cases"), 180
    )
    for name in SITES:
        assert (tmp_path / f"{name}-tp2.zarr").exists(), ended
        got, wanted = Archive(tmp_path / f"{name}-tp2.zarr"), Archive(tmp_path / f"{name}.zarr")
        assert (got.sites, got.n_rows, got.is_sealed) == (wanted.sites, wanted.n_rows, True)
        for site in wanted.sites:
            ours, theirs = (np.asarray(each[site][:], np.float64) for each in (got, wanted))
            np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max(), err_msg=site)
        assert not verify(got.path).problems
