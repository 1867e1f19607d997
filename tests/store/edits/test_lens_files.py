"""Lens files that an edit names: a hostile file takes no memory."""

from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch

from residua.store.base.errors import PlanError
from residua.store.edits.lens_files import read_linear_map
from residua.store.format.site_names import parse_site

SITE = parse_site("resid_post.0")


def test_the_map_of_a_site_is_read_as_stored(tmp_path: Path) -> None:
    weight, bias = torch.randn(4, 4).bfloat16(), torch.randn(4)
    torch.save({"1.weight": weight, "1.bias": bias}, tmp_path / "params.pt")
    found_weight, found_bias = read_linear_map(tmp_path, SITE)
    assert torch.equal(found_weight, weight)
    assert torch.equal(found_bias, bias)
    torch.save({"1.weight": weight}, tmp_path / "params.pt")
    assert torch.equal(read_linear_map(tmp_path, SITE)[1], torch.zeros(4))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"1.weight": torch.zeros(1).expand(10**13, 4)}, r"params\.pt.*resid_post\.0.*\(10000000000000, 4\)"),
        ({"1.weight": torch.zeros(1).expand(10**6, 10**6)}, r"params\.pt.*resid_post\.0"),
        ({"1.weight": torch.zeros(10**13, 0)}, r"params\.pt.*resid_post\.0"),
        ({"1.weight": torch.zeros(4, 4), "1.bias": torch.zeros(1).expand(10**13)}, r"params\.pt.*resid_post\.0.*bias"),
        ({"2.weight": torch.zeros(4, 4)}, r"params\.pt.*resid_post\.0.*1\.weight"),
    ],
)
def test_tensors_without_their_numbers_in_the_file_are_refused(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    torch.save(tensors, tmp_path / "params.pt")
    with pytest.raises(PlanError, match=message):
        read_linear_map(tmp_path, SITE)


def test_a_compressed_file_is_refused(tmp_path: Path) -> None:
    torch.save({"1.weight": torch.zeros(4, 4)}, tmp_path / "params.pt")
    with ZipFile(tmp_path / "params.pt", "a", ZIP_DEFLATED) as file:
        file.writestr("archive/data/99", bytes(2**20))
    with pytest.raises(PlanError, match=r"params\.pt.*compressed"):
        read_linear_map(tmp_path, SITE)


@pytest.mark.parametrize("text", ['{"depths": 7}', "[" * 100_000, "{}", '{"depths": [2]}'])
def test_the_list_of_trained_layers_is_checked(text: str, tmp_path: Path) -> None:
    torch.save({"1.weight": torch.zeros(4, 4)}, tmp_path / "params.pt")
    (tmp_path / "residua.json").write_text(text)
    with pytest.raises(PlanError, match=str(tmp_path)):
        read_linear_map(tmp_path, SITE)
