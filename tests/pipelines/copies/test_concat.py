"""Archives that were joined: all values, tokens and columns one after the other, and what does not fit is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residua.pipelines.cli.main import main
from residua.pipelines.copies.concat import CONCATENATED, SOURCE_ARCHIVE, concat
from residua.pipelines.copies.extract import extract
from residua.pipelines.copies.rewritten import SOURCE_EXAMPLE
from residua.store.base.errors import NotCapturedError, PlanError
from residua.store.read.archive import Archive
from residua.store.verification.verify import verify
from tests.analysis.rows_archive import write_rows
from tests.plain_zarr import plain_array
from tests.servers.files import serving_files
from tests.stopped import take_back
from tests.store.small_archive import make_archive


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three archives of the same model: one, and two parts of it."""
    made = tmp_path_factory.mktemp("concat")
    one = make_archive(made / "one.zarr")
    extract(one, made / "two.zarr", examples=[2, 0])
    extract(one, made / "three.zarr", rows="position in [0, 2, 4]", sites="q.*")
    return made


def test_rows_are_those_of_all_archives_in_order(folder: Path, tmp_path: Path) -> None:
    places = [folder / "two.zarr", folder / "one.zarr", folder / "two.zarr"]
    sources, steps = [Archive(place) for place in places], []
    made = concat(places, tmp_path / "c.zarr", on_row=lambda *step: steps.append(step))
    assert steps[-1] == (made.n_rows, made.n_rows)
    assert made.is_sealed
    assert verify(made.path).problems == []
    for site in made.sites:
        expected = np.concatenate([plain_array(each.path, each.plan.site(site).path) for each in sources])
        assert np.array_equal(plain_array(made.path, made.plan.site(site).path), expected)
    for column in ("token", "position"):
        expected = np.concatenate([getattr(each.rows, column)[:] for each in sources])
        assert np.array_equal(getattr(made.rows, column)[:], expected)
    at = made.examples.to_pydict()
    for number, (archive, example) in enumerate(zip(at[SOURCE_ARCHIVE], at[SOURCE_EXAMPLE], strict=True)):
        source = sources[archive]
        assert np.array_equal(made.example_table.tokens(number), source.example_table.tokens(example))
        assert at["label"][number] == source.examples["label"][example].as_py()
        for site, values in made.example(number).items():
            assert np.array_equal(values, source.example(example)[site])
    entries: Any = made.provenance[CONCATENATED]
    assert [entry["archive"] for entry in entries] == [each.plan.digest for each in sources]
    assert [entry["rows"][1] for entry in entries] == np.cumsum([each.n_rows for each in sources]).tolist()
    assert made.text(made.n_rows - 1)


def test_some_sites_from_addresses_and_on_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving_files(folder) as server:
        words = [f"{server.url}/one.zarr", f"{server.url}/three.zarr", "--sites", "q.1"]
        assert main(["concat", *words, "--out", str(tmp_path / "c.zarr"), "--json"]) == 0
        assert main(["extract", f"{server.url}/one.zarr", "--examples", "1", "--out", str(tmp_path / "e.zarr")]) == 0
    made, one, three = (Archive(place) for place in (tmp_path / "c.zarr", folder / "one.zarr", folder / "three.zarr"))
    assert json.loads(capsys.readouterr().out.splitlines()[0])["rows"] == one.n_rows + three.n_rows
    assert made.sites == ("q.1",)
    assert np.array_equal(made["q.1"][:], np.concatenate([one["q.1"][:], three["q.1"][:]]))
    assert np.array_equal(Archive(tmp_path / "e.zarr")["q.1"][:], one["q.1"][20:21])


def test_what_does_not_fit_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    one, out = folder / "one.zarr", tmp_path / "c.zarr"
    with pytest.raises(PlanError, match="1 archive was given"):
        concat([one], out)
    with pytest.raises(PlanError, match=r"resid_post\.0 is in .*one\.zarr, and not in .*three\.zarr.*q\.1"):
        concat([folder / "three.zarr", one], out)
    with pytest.raises(PlanError, match=r"different models.*weights"):
        concat([one, make_archive(tmp_path / "other.zarr", seed=1)], out)
    with pytest.raises(PlanError, match="int8-block32"):
        concat([make_archive(tmp_path / "int8.zarr", "int8-block32")] * 2, out)
    make_archive(tmp_path / "raw.zarr", "raw")
    with pytest.raises(PlanError, match=r"has the codec raw in .*raw\.zarr, and fast"):
        concat([tmp_path / "raw.zarr", one], out)
    take_back(make_archive(tmp_path / "open.zarr"), 1)
    with pytest.raises(NotCapturedError):
        concat([one, tmp_path / "open.zarr"], out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"dtype": np.float64}, "resid_post.0 has the dtype float32 in .*, and float64"),
        ({"width": 5}, r"resid_post.0 has the row_shape \(4,\) in .*, and \(5,\)"),
        ({"labels": ["a", "b"]}, "column label of the examples is int64 in .*, and string"),
    ],
)
def test_other_types_and_shapes_are_refused(other: dict[str, Any], message: str, tmp_path: Path) -> None:
    def make(name: str, dtype: Any = np.float32, width: int = 4, labels: Any = (0, 1)) -> Archive:
        values = {"resid_post.0": np.ones((6, width), dtype)}
        return write_rows(tmp_path / name, [2, 4], values, columns={"label": list(labels)}, rows_per_shard=4)

    with pytest.raises(PlanError, match=message):
        concat([make("a.zarr"), make("b.zarr", **other)], tmp_path / "c.zarr")
