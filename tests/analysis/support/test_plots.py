"""Plots are written, show the names, and show the values."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from residua.analysis.support.plots import heat_map, line_plot


def words(path: Path) -> str:
    """Return the texts of an SVG; matplotlib writes each as a comment before its outlines."""
    return "|".join(re.findall("<!--(.*?)-->", path.read_text()))


def test_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "lens.svg"
    line_plot(
        path,
        range(6),
        {"logit lens": [5, 4, 3, 2, 1, 0.5], "tuned lens": [2, 1.5, 1, 0.7, 0.3, 0.1]},
        title="KL to the model's own prediction",
        x_name="layer",
        y_name="nats",
    )
    shown = words(path)
    assert all(name in shown for name in ("logit lens", "tuned lens", "KL to the model's own", "layer", "nats"))


@pytest.mark.parametrize("size", [(3, 4), (40, 70)])
def test_a_map_has_its_first_row_on_top(tmp_path: Path, size: tuple[int, int]) -> None:
    values = np.zeros(size)
    values[0] = 1.0
    path = tmp_path / "heads.png"
    heat_map(path, values, title="Induction", x_name="head", y_name="layer", value_name="score")
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"), int)
    yellow = np.argwhere(np.abs(pixels - [253, 231, 36]).sum(-1) < 12)
    purple = np.argwhere(np.abs(pixels - [68, 1, 84]).sum(-1) < 12)
    left = yellow[:, 1] < pixels.shape[1] // 2  # the colour bar is on the right
    assert yellow[left][:, 0].mean() < purple[purple[:, 1] < pixels.shape[1] // 2][:, 0].mean()


def test_zero_is_the_middle_of_a_centred_map(tmp_path: Path) -> None:
    path = tmp_path / "patch.png"
    heat_map(
        path, [[-1.0, np.nan], [0.25, 1.0]], title="Patch", x_name="x", y_name="y", value_name="logits", centred=True
    )
    with Image.open(path) as picture:
        colours = {tuple(pixel) for pixel in np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist()}
    assert {(103, 0, 31), (5, 48, 97)} <= colours
