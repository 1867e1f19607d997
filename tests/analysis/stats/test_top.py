"""The rows along a direction, compared with a full sort of scores in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from residua.analysis.stats.directions import read_direction
from residua.analysis.stats.top import top
from residua.store.base.errors import AnalysisError, UnknownSiteError
from residua.store.read.archive import Archive
from tests.analysis.rows_archive import write_rows

LENGTHS = (70, 1, 30, 99, 5, 200)
N_ROWS = sum(LENGTHS)
EXAMPLE = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
POSITION = np.concatenate([np.arange(n) for n in LENGTHS])


def made_up() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    values = rng.integers(-3, 4, (N_ROWS, 6)).astype(np.float32)  # few different ones, so that scores tie
    values[7] = np.nan
    values[9, 0] = np.inf
    return {"resid_post.0": values, "z.1": rng.standard_normal((N_ROWS, 3, 4)).astype(np.float16)}


VALUES = made_up()
DIRECTION = np.array([1.0, 0, -2, 0, 1, 0])


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return write_rows(tmp_path_factory.mktemp("top") / "a.zarr", LENGTHS, VALUES)


def ranking(scores: Any, rows: Any, k: int, *, bottom: bool = False, per_example: bool = False) -> list[int]:
    """Sort everything; of equal scores the lower row first."""
    kept = [int(row) for row in rows if not np.isnan(scores[row])]
    kept.sort(key=lambda row: (scores[row] if bottom else -scores[row], row))
    if per_example:
        best: dict[int, int] = {}
        for row in kept:
            best.setdefault(int(EXAMPLE[row]), row)
        kept = list(best.values())
    return kept[:k]


@pytest.mark.parametrize("bottom", [False, True])
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("where", [None, "position > 3 and example != 5"])
@pytest.mark.parametrize("k", [1, 20, 1000])
def test_it_is_the_full_sort(archive: Archive, k: int, where: str | None, per_example: bool, bottom: bool) -> None:
    with np.errstate(invalid="ignore"):
        scores = VALUES["resid_post.0"].astype(np.float64) @ DIRECTION
    scores[9] = np.inf
    rows = [row for row in range(N_ROWS) if where is None or (POSITION[row] > 3 and EXAMPLE[row] != 5)]
    options: dict[str, Any] = {"k": k, "bottom": bottom, "per_example": per_example, "where": where}
    found = top(archive, "resid_post.0", direction=DIRECTION, task_rows=100, **options)
    expected = ranking(scores, rows, k, bottom=bottom, per_example=per_example)
    assert found["row"].to_pylist() == expected
    assert found["score"].to_pylist() == scores[expected].tolist()
    assert found["example"].to_pylist() == EXAMPLE[expected].tolist()
    assert found["position"].to_pylist() == POSITION[expected].tolist()
    assert found["token"].to_pylist() == [row % 50 for row in expected]


def test_channels_and_heads(archive: Archive) -> None:
    flat = VALUES["z.1"].astype(np.float64).reshape(N_ROWS, 12)
    wanted = np.random.default_rng(1).standard_normal((3, 4))
    scores = {
        "channel 6": (top(archive, "z.1", channel=6), flat[:, 6]),
        "channel of a head": (top(archive, "z.1", channel=2, head=1), flat[:, 6]),
        "full row": (top(archive, "z.1", direction=wanted), flat @ wanted.ravel()),
        "flat": (top(archive, "z.1", direction=wanted.ravel().tolist()), flat @ wanted.ravel()),
        "head": (top(archive, "z.1", direction=wanted[2], head=2), flat[:, 8:] @ wanted[2]),
    }
    for name, (found, expected) in scores.items():
        order = ranking(expected, range(N_ROWS), 20)
        assert found["row"].to_pylist() == order, name
        np.testing.assert_allclose(found["score"], expected[order], rtol=1e-12)


def test_a_channel_counts_even_where_another_is_infinite(archive: Archive) -> None:
    assert top(archive, "resid_post.0", channel=1, k=N_ROWS, where="position == 9")["row"].to_pylist().count(9) == 1


def test_the_text_shows_the_token(archive: Archive, tmp_path: Path) -> None:
    found = top(archive, "resid_post.0", direction=DIRECTION, k=3)
    for row, text in zip(found["row"].to_pylist(), found["text"].to_pylist(), strict=True):
        assert f"«w{row % 50}»" in text
        assert text == archive.text(row)
    without = write_rows(tmp_path / "bare.zarr", (5,), {"resid_post.0": np.ones((5, 2), np.float32)}, files={})
    assert top(without, "resid_post.0", channel=0)["text"].to_pylist() == [None] * 5


def test_directions_from_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", DIRECTION.astype(np.float32))
    safetensors.numpy.save_file({"anything": DIRECTION}, tmp_path / "b.safetensors")
    safetensors.torch.save_file({"x": torch.tensor(DIRECTION, dtype=torch.bfloat16)}, tmp_path / "c.safetensors")
    safetensors.numpy.save_file({"weight": DIRECTION[None], "bias": np.ones(1)}, tmp_path / "d.safetensors")
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(read_direction(path).ravel(), DIRECTION)


def test_files_that_are_no_direction(tmp_path: Path) -> None:
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], object), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    with (tmp_path / "claims-much.npy").open("wb") as file:
        header = {"descr": "<f8", "fortran_order": False, "shape": (10**13,)}
        np.lib.format.write_array_header_1_0(file, header)
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 9)
    np.save(tmp_path / "text.npy", np.array(["a"]))
    np.savez(tmp_path / "many.npz", a=DIRECTION)
    safetensors.numpy.save_file({"a": DIRECTION, "b": DIRECTION}, tmp_path / "two.safetensors")
    for path in [*tmp_path.iterdir(), tmp_path / "none.npy", tmp_path]:
        with pytest.raises(AnalysisError, match=str(path)):
            read_direction(path)


@pytest.mark.parametrize(
    ("site", "asked", "quoted"),
    [
        ("resid_post.0", {"direction": np.ones(7)}, r"\(7,\).* resid_post.0 has 6 values"),
        ("z.1", {"direction": np.ones(4)}, "z.1 has 3 x 4 values.* heads"),
        ("z.1", {"direction": np.ones((4, 3))}, r"\(4, 3\).* z.1 has 3 x 4 values"),
        ("resid_post.0", {"direction": np.full(6, np.nan)}, "NaN"),
        ("resid_post.0", {"channel": 6}, "channel 6 of resid_post.0.* 0 to 5"),
        ("resid_post.0", {"channel": 0, "head": 0}, "head 0 of resid_post.0.* no heads"),
        ("z.1", {"channel": 0, "head": 3}, "head 3 of z.1.* 0 to 2"),
        ("resid_post.0", {}, "resid_post.0.* direction or .*channel"),
        ("resid_post.0", {"channel": 0, "direction": np.ones(6)}, "resid_post.0.* direction or .*channel"),
        ("*", {"channel": 0}, "2 sites.* name one"),
        ("resid_post.0", {"channel": 0, "k": 0}, " 0 rows.* at least 1"),
        ("resid_post.0", {"channel": 0, "where": "position > 1000"}, "resid_post.0 .*no row"),
    ],
)
def test_bad_arguments_are_named(archive: Archive, site: str, asked: Any, quoted: str) -> None:
    with pytest.raises(AnalysisError, match=quoted):
        top(archive, site, **asked)


def test_a_site_that_is_not_there(archive: Archive) -> None:
    with pytest.raises(UnknownSiteError, match=r"resid_post\.1"):
        top(archive, "resid_post.1", channel=0)
