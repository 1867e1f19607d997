"""Lenses that edits name: what a stranger's file claims takes no memory."""

from pathlib import Path

import pytest
import torch

from residua.capture.edits.lens_map import lens_map
from residua.store.base.errors import PlanError
from residua.store.format.site_names import parse_site


def test_a_weight_of_terabytes_in_a_small_file_is_refused(tmp_path: Path) -> None:
    torch.save({"1.weight": torch.zeros(1).expand(10**13, 4)}, tmp_path / "params.pt")
    with pytest.raises(PlanError, match=r"has a weight of shape \(10000000000000, 4\), and is no affine map"):
        lens_map(tmp_path, parse_site("resid_post.0"))
