"""A folder of archives, one for each stack: what it reads like, what is refused, and what other readers see."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import zarr

import residua
from residua.analysis.probes.probe import probe
from residua.analysis.stats.stats import stats
from residua.store.base.canonical import digest_of
from residua.store.base.errors import DamagedArchiveError, PlanError, ResiduaError, UnknownSiteError, UnsafeArchiveError
from residua.store.format.stacks import create_stacks
from residua.store.read.archive import Archive
from tests.store.small_archive import N_ROWS, make_archive

Make = Callable[[Path], Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of an encoder's and a decoder's archive."""
    path = tmp_path / "acts.zarr"
    create_stacks(path, ["encoder", "decoder"])
    for seed, stack in enumerate(("encoder", "decoder")):
        make_archive(path / stack, seed=seed, stack=stack)
    return path


def test_sites_of_all_stacks_are_read_by_their_names(folder: Path) -> None:
    archive = residua.open(folder)
    assert archive.sites == ("encoder.resid_post.0", "encoder.q.1", "decoder.resid_post.0", "decoder.q.1")
    for stack in ("encoder", "decoder"):
        alone = Archive(folder / stack)
        for name in alone.sites:
            np.testing.assert_array_equal(archive[name][:], alone[name][:])
            plain: Any = zarr.open_group(folder, mode="r")
            np.testing.assert_array_equal(plain[f"{stack}/{alone.plan.site(name).path}"][:], alone[name][:])
        assert archive.stacks[stack].n_rows == N_ROWS
        np.testing.assert_array_equal(archive.stacks[stack]["resid_post.0"][:], archive[f"{stack}.resid_post.0"][:])
    assert archive.is_sealed
    assert archive.progress.rows == archive.progress.total_rows == 2 * N_ROWS
    assert archive.select("resid_post.*") == ("encoder.resid_post.0", "decoder.resid_post.0")


def test_rows_of_one_stack_are_analysed(folder: Path) -> None:
    archive = residua.open(folder)
    rows = sum(len(batch["row"]) for batch in archive.loader("decoder.*", batch_size=8))
    assert rows == N_ROWS
    found = probe(archive, "position", "encoder.resid_post.*", task="regression", group="example")
    assert found["site"].to_pylist() == ["encoder.resid_post.0"]
    mean = stats(archive, "decoder.resid_post.0", components=0).channels["mean"].to_numpy()
    np.testing.assert_allclose(mean, archive["decoder.resid_post.0"][:].astype(np.float64).mean(0), rtol=1e-6)


@pytest.fixture
def crossed(tmp_path: Path) -> Path:
    """The same with the keys of cross-attention, which are the decoder's and have rows of the encoder."""
    path = tmp_path / "cross.zarr"
    create_stacks(path, ["encoder", "decoder"])
    make_archive(path / "encoder", stack="encoder", cross=True)
    make_archive(path / "decoder", seed=1, stack="decoder")
    return path


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        ("decoder.*", ["decoder.cross_k.1", "decoder.resid_post.0", "decoder.q.1"]),
        ("decoder.cross_k.*", ["decoder.cross_k.1"]),
        (
            "*",
            [
                *("encoder.resid_post.0", "encoder.q.1", "decoder.cross_k.1"),
                *("decoder.resid_post.0", "decoder.q.1"),
            ],
        ),
    ],
)
def test_statistics_are_of_sites_with_rows_of_any_stack(crossed: Path, sites: str, expected: list[str]) -> None:
    archive = residua.open(crossed)
    found = stats(archive, sites, components=0, where="position > 0")
    assert found.sites["site"].to_pylist() == expected
    for site in expected:
        own = archive.of_sites(site)
        rows = own[site][:].reshape(own.n_rows, -1).astype(np.float64)[np.asarray(own.rows.position[:], np.int64) > 0]
        mean = found.channels.filter(pc.field("site") == site)["mean"].to_numpy()
        np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-5, atol=1e-7)


def test_a_page_of_a_stack_leaves_out_what_has_rows_of_another_and_says_so(crossed: Path, tmp_path: Path) -> None:
    made = residua.page(crossed, tmp_path / "page", sites="decoder.*")
    assert any("decoder.cross_k.1" in note and "encoder" in note for note in made.notes)
    text = (Path(made.file).parent / "data" / "archive.js").read_text()
    assert "decoder.resid_post.0" in text
    alone = residua.page(crossed, tmp_path / "alone", sites="decoder.cross_k.*")
    assert not any("cross_k" in note for note in alone.notes)
    for sites in ("*", "resid_post.*", "decoder.cross_k.1,encoder.q.1,decoder.q.1"):
        with pytest.raises(UnknownSiteError, match=r"encoder.*decoder.*cross_k"):
            residua.page(crossed, tmp_path / "both", sites=sites)
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize("sites", ["z.*", "decoder.z.1", "resid_post.7"])
def test_a_site_of_no_stack_is_unknown(folder: Path, sites: str) -> None:
    for use in (residua.open(folder).select, residua.open(folder).of_sites):
        with pytest.raises(UnknownSiteError, match=re.escape(sites)):
            use(sites)


@pytest.mark.parametrize(
    "use",
    [
        lambda archive: archive.rows,
        lambda archive: archive.n_rows,
        lambda archive: archive.example(0),
        lambda archive: archive.text(0),
        lambda archive: archive.loader("resid_post.0", batch_size=4),
        lambda archive: probe(archive, "position", "*"),
        lambda archive: archive["q.1"],
    ],
)
def test_what_is_of_one_stack_names_the_stacks(folder: Path, use: Callable[[Archive], object]) -> None:
    with pytest.raises((PlanError, UnknownSiteError), match=r"encoder and decoder") as caught:
        use(residua.open(folder))
    assert "encoder" in str(caught.value)


def test_a_folder_of_stacks_is_not_one_archive(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"acts.zarr/encoder"):
        Archive(folder)
    with pytest.raises(PlanError, match=r"encoder and decoder.*decoder.*out="):
        create_stacks(folder, ["decoder"])
    create_stacks(folder, ["encoder", "decoder"])
    with pytest.raises(PlanError, match="one stack"):
        create_stacks(make_archive(tmp_path / "one.zarr"), ["encoder", "decoder"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="mine"):
        create_stacks(tmp_path / "mine", ["encoder"])


def test_a_stack_that_is_not_begun_is_missing_and_no_damage(tmp_path: Path) -> None:
    create_stacks(tmp_path / "a", ["encoder", "decoder"])
    make_archive(tmp_path / "a" / "encoder", stack="encoder")
    archive = residua.open(tmp_path / "a")
    assert not archive.is_sealed
    assert archive.progress.total_rows is None
    assert set(archive.sites) == {"encoder.resid_post.0", "encoder.q.1"}
    report = residua.verify(tmp_path / "a")
    assert report.is_sound
    assert any("decoder" in note for note in report.notes)


def test_damage_is_found_in_each_stack(folder: Path) -> None:
    assert residua.verify(folder).is_sound
    assert residua.verify(folder).n_files == 2 * residua.verify(folder / "encoder").n_files
    shard = folder / "decoder/sites/decoder/resid_post/0/c/1/0"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    (folder / "stray").touch()
    report = residua.verify(folder)
    assert {problem.path for problem in report.problems} == {"decoder/sites/decoder/resid_post/0/c/1/0"}
    assert any("stray" in note for note in report.notes)


@pytest.mark.parametrize(
    "stacks", [[], "encoder", ["../x"], ["encoder", "encoder"], [3], {"encoder": 1}, ["encoder", "elsewhere"]]
)
def test_forged_names_of_stacks_are_refused(tmp_path: Path, stacks: object) -> None:
    entry: dict[str, Any] = {"format": "1.0", "stacks": stacks}
    attributes = {"residua": {**entry, "sha256": digest_of(entry)}}
    root = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    (tmp_path / "zarr.json").write_text(json.dumps(root))
    for read in (residua.open, Archive):
        with pytest.raises(ResiduaError):
            read(tmp_path)
    with pytest.raises(UnsafeArchiveError):
        residua.open(tmp_path)


def test_altered_names_and_links_that_lead_out_are_refused(folder: Path, tmp_path: Path) -> None:
    text = (folder / "zarr.json").read_text()
    (folder / "zarr.json").write_text(text.replace("decoder", "vision"))
    with pytest.raises(DamagedArchiveError, match=r"zarr.json"):
        residua.open(folder)
    (folder / "zarr.json").write_text(text)
    (folder / "decoder").rename(tmp_path / "elsewhere")
    (folder / "decoder").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeArchiveError, match="decoder"):
        residua.open(folder)
    assert not residua.verify(folder).is_sound
