"""Probes and directions between rows as edits, without reshaping: compared with the same sum by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import residua
from residua.analysis.probes.linear_probe import LogisticProbe, RidgeProbe
from residua.store.base.errors import PlanError
from residua.store.read.archive import Archive
from tests.models.tiny import TINY, VOCABULARY

RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(3, VOCABULARY, n).tolist() for n in (6, 9, 4, 7)]
RESID, HEADS = "resid_post.0", "z.1"


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def captured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Archive]:
    model = TINY[request.param]()
    run = residua.run(model, PROMPTS, sites=[RESID, HEADS])
    return model, run.save(tmp_path_factory.mktemp("directions") / "acts.zarr")


def probe_of(archive: Archive, site: str, n_classes: int = 2) -> LogisticProbe:
    rows = archive[site][:]
    return LogisticProbe(penalty=0.1).fit(rows, np.arange(len(rows)) % n_classes)


def edited(model: Any, archive: Archive, site: str, **edit: Any) -> list[np.ndarray[Any, Any]]:
    """Return the rows of `site` after an edit, by `residua.run` and by `residua.replay`, which have to be equal."""
    edits = [{"edit": "add", "site": site, **edit}]
    run = residua.run(model, PROMPTS, sites=site, edits=edits)
    with residua.replay(model, archive, examples=range(len(PROMPTS)), keep=site, edits=edits) as replayed:
        for one, other in zip(run[site], replayed[site], strict=True):
            assert torch.allclose(one, other, atol=1e-5)
    return [rows.double().numpy() for rows in run[site]]


def test_a_direction_a_probe_and_its_files_are_vectors(captured: tuple[Any, Archive], tmp_path: Path) -> None:
    model, archive = captured
    for site in (RESID, HEADS):
        shape = archive[site].shape[1:]
        probe = probe_of(archive, site)
        probe.save(tmp_path / site)
        ridge = RidgeProbe().fit(archive[site][:], RNG.standard_normal(archive.n_rows))
        found = residua.direction(archive, "is_last", site=site)
        by_name = str((tmp_path / site / "probe.safetensors").relative_to(tmp_path))
        for vector, numbers in (
            (found, found),
            (probe, probe.coef_),
            (probe.coef_, probe.coef_),
            (ridge.coef_, ridge.coef_),
            (tmp_path / site, probe.coef_),
            (tmp_path / by_name, probe.coef_),
        ):
            new = edited(model, archive, site, vector=vector, scale=3.0)
            for place, (start, stop) in enumerate(zip([0, 6, 15, 19], [6, 15, 19, 26], strict=True)):
                wanted = archive[site][start:stop].astype(np.float64) + 3.0 * np.reshape(numbers, shape)
                np.testing.assert_allclose(new[place], wanted, rtol=1e-4, atol=1e-4)


def test_a_direction_of_all_heads_is_projected_out_of_the_full_row(captured: tuple[Any, Archive]) -> None:
    model, archive = captured
    for site in (RESID, HEADS):
        probe = probe_of(archive, site)
        new = edited(model, archive, site, edit="project_out", directions=probe)
        old = archive[site][:].astype(np.float64).reshape(archive.n_rows, -1)
        unit = probe.coef_[0] / np.linalg.norm(probe.coef_)
        wanted = old - np.outer(old @ unit, unit)
        np.testing.assert_allclose(np.concatenate(new).reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-4)


def test_several_vectors_are_refused(captured: tuple[Any, Archive]) -> None:
    model, archive = captured
    with pytest.raises(PlanError, match=r"3 vectors.*coef_\[0\]"):
        edited(model, archive, RESID, vector=probe_of(archive, RESID, 3))


def test_rows_of_two_archives_of_the_same_prompts_go_back_into_the_model(
    captured: tuple[Any, Archive], tmp_path: Path
) -> None:
    model, archive = captured
    for place, site in enumerate((RESID, HEADS)):
        residua.run(model, PROMPTS, sites=site).save(tmp_path / f"{place}.zarr")
    joined = residua.open([tmp_path / "0.zarr", tmp_path / "1.zarr"])
    with (
        residua.replay(model, joined, examples=[0, 2], at=[RESID, HEADS]) as ours,
        residua.replay(model, archive, examples=[0, 2], at=[RESID, HEADS]) as theirs,
    ):
        for one, other in zip(ours.logits, theirs.logits, strict=True):
            assert torch.equal(one, other)
    swap = {"edit": "set", "site": HEADS, "to": "stored", "examples": [1]}
    with residua.replay(model, joined, examples=[1], edits=[swap]) as run:
        assert torch.allclose(run.logits[0], run.original_logits[0], atol=1e-5)
