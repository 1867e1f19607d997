"""Labels a token, from a dataset to a probe: each row has its token's own, whatever was cut."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from residua.analysis.probes.probe import probe
from residua.pipelines.capture.capture import capture_dataset
from residua.store.read.archive import Archive

IGNORED = -100


def rows_of(ignored: int | None) -> list[dict[str, Any]]:
    """Return rows of token ids whose labels say how each token compares with 40, padded on the left."""
    random = np.random.default_rng(0)
    rows = []
    for n in range(18, 42):
        ids = random.integers(3, 97, n).tolist()
        labels = [ignored] * 4 + [int(token > 40) for token in ids[4:]]
        pad = n % 3
        rows.append(
            {
                "input_ids": [0] * pad + ids,
                "attention_mask": [0] * pad + [1] * n,
                "labels": [ignored] * pad + labels,
            }
        )
    return rows


def probed(archive: Archive, **options: Any) -> dict[str, Any]:
    """Return the one row of a probe's table."""
    found: dict[str, Any] = probe(archive, "labels", "embed", **options).to_pylist()[0]
    return found


@pytest.mark.parametrize("options", [{}, {"max_length": 16}, {"max_length": 16, "long_examples": "truncate"}])
@pytest.mark.parametrize("ignored", [IGNORED, None])
def test_what_is_ignored_is_left_out_by_a_condition(
    llama: PreTrainedModel, tmp_path: Path, ignored: int | None, options: dict[str, Any]
) -> None:
    rows = rows_of(ignored)
    archive = capture_dataset(llama, rows, out=tmp_path / "a.zarr", sites="embed", **options).archive
    lists = archive.examples["labels"].to_pylist()
    tokens, positions, examples = (
        column[:].tolist() for column in (archive.rows.token, archive.rows.position, archive.rows.example)
    )
    found = [lists[example][position] for example, position in zip(examples, positions, strict=True)]
    assert all(label in (ignored, int(token > 40)) for label, token in zip(found, tokens, strict=True))
    n_labelled = sum(label != ignored for label in found)
    where = "labels != null" if ignored is None else "labels != -100"
    result = probed(archive, where=where)
    assert result["n_classes"] == 2
    assert result["n_train"] + result["n_test"] == n_labelled
