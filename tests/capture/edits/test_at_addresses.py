"""Edits that take archives, lenses and vectors from addresses, and files of edits there: the same as from a folder."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import residua
from residua.analysis.lens.checkpoint import LensConfig, Translator
from residua.analysis.lens.lens import TunedLens
from residua.analysis.lens.lm_head import load_lm_head
from residua.analysis.probes.files import SavedProbe, write_probe
from residua.store.base.errors import PlanError
from residua.store.edits.contents import contents_of
from residua.store.edits.parser import parse_edits
from tests.models.tiny import TINY, VOCABULARY
from tests.servers.files import serving_files

RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(3, VOCABULARY, 6).tolist() for _ in range(2)]
OTHERS = [RNG.integers(3, VOCABULARY, 6).tolist() for _ in range(2)]
SITE = "resid_post.0"


class Served(NamedTuple):
    """A model, the folder of what its edits name, and the address of that folder."""

    model: Any
    folder: Path
    url: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder, model = tmp_path_factory.mktemp("edits"), TINY["gpt2"]()
    width, n_layers = model.config.n_embd, model.config.n_layer
    other = residua.run(model, OTHERS, sites=SITE).save(folder / "other.zarr")
    np.save(folder / "vector.npy", RNG.standard_normal(width))
    write_probe(folder / "probe", SavedProbe(RNG.standard_normal((1, width)), np.zeros(1), 1.0, None, {}))
    maps = {1: Translator(torch.full((width, width), 0.1), torch.ones(width))}
    config = LensConfig(base_model_name_or_path="none", d_model=width, num_hidden_layers=n_layers)
    TunedLens(load_lm_head(other.head), maps, config).save(folder / "lens")
    edits = [*edits_of(""), {"edit": "scale", "site": "resid_post.1", "by": 0.5}]
    (folder / "edits.yaml").write_text(json.dumps(edits))
    with serving_files(folder) as server:
        yield Served(model, folder, server.url)


def edits_of(place: str) -> list[dict[str, Any]]:
    return [
        {"edit": "mean", "site": SITE, "archive": f"{place}other.zarr", "positions": [1]},
        {"edit": "swap", "site": SITE, "archive": f"{place}other.zarr", "source": 1, "positions": [2]},
        {"edit": "add", "site": SITE, "vector": f"{place}vector.npy", "positions": [3]},
        {"edit": "project_out", "site": SITE, "directions": f"{place}probe", "positions": [4]},
        {"edit": "lens", "site": SITE, "lens": f"{place}lens", "positions": [5]},
    ]


def test_runs_are_the_same(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(served.folder)
    for here, there in zip(edits_of(""), edits_of(f"{served.url}/"), strict=True):
        one, other, plain = (
            residua.run(served.model, PROMPTS, sites="final", edits=edits)["final"] for edits in ([here], [there], [])
        )
        for mine, theirs, before in zip(one, other, plain, strict=True):
            assert torch.equal(mine, theirs)
            assert not torch.equal(mine, before)


def test_a_file_of_edits_names_what_lies_beside_it(served: Served) -> None:
    here = residua.run(served.model, PROMPTS, edits=served.folder / "edits.yaml")
    there = residua.run(served.model, PROMPTS, edits=f"{served.url}/edits.yaml")
    assert all(torch.equal(one, other) for one, other in zip(here.logits, there.logits, strict=True))
    found = contents_of(parse_edits(f"{served.url}/edits.yaml"))
    mine = contents_of(parse_edits(served.folder / "edits.yaml"))
    archive = served.folder / "other.zarr"
    assert found[f"{served.url}/other.zarr"] == mine[str(archive)]
    assert found.keys() == {f"{served.url}/other.zarr", f"{served.url}/lens"}


def test_an_open_archive_at_an_address(served: Served) -> None:
    there = residua.open(f"{served.url}/other.zarr", cache=False)
    edits = [[{"edit": "mean", "site": SITE, "archive": one}] for one in (served.folder / "other.zarr", there)]
    one, other = (residua.run(served.model, PROMPTS, edits=each).logits for each in edits)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


def test_what_is_not_there_or_cannot_be_is_said(served: Served, tmp_path: Path) -> None:
    def refused(edit: dict[str, Any], match: str) -> None:
        with pytest.raises(PlanError, match=match):
            residua.run(served.model, PROMPTS, edits=[{"site": SITE, **edit}])

    refused({"edit": "mean", "archive": f"{served.url}/none.zarr"}, f"{served.url}/none.zarr")
    refused({"edit": "overlay", "overlay": f"{served.url}/other.zarr"}, "a folder of this machine")
    refused({"edit": "lens", "lens": "ftp://host/lens"}, "ftp")
    refused({"edit": "add", "vector": f"{served.url}/none.npy"}, r"none\.npy")
    (served.folder / "out.yaml").write_text(json.dumps([{"edit": "add", "site": SITE, "vector": "../secret.npy"}]))
    with pytest.raises(PlanError, match=r"'\.\./secret\.npy' leads out of"):
        parse_edits(f"{served.url}/out.yaml")
    with pytest.raises(PlanError, match=r"none\.yaml"):
        parse_edits(f"{served.url}/none.yaml")
