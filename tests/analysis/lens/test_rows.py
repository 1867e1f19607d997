"""Which rows train a lens and which evaluate it, in finished and in unfinished archives."""

from pathlib import Path

import numpy as np
import pytest

from residua.analysis.lens.lens_settings import LensSettings
from residua.analysis.lens.rows import LensRows
from residua.analysis.rows.held_out import held_out_groups
from residua.pipelines.capture.capture import capture_dataset
from residua.store.read.archive import Archive
from tests.analysis.lens_archive import N_EXAMPLES, examples, held_out_rows, is_late, make_lens_archive
from tests.models.tiny import TINY
from tests.stopped import take_back


def test_rows_of_held_out_examples_never_train(lens_archive: Archive) -> None:
    settings = LensSettings()
    reader = LensRows(lens_archive, settings)
    training = np.sort(np.concatenate(list(reader.epoch_rows("resid_post.0", 0, 0, 1))))
    assert training.tolist() == reader.training_rows(reader.chunks()).tolist()
    is_held = held_out_groups(np.arange(N_EXAMPLES), fraction=0.1)[lens_archive.rows.example[:].astype(np.int64)]
    late = is_late(lens_archive)
    assert training.tolist() == np.flatnonzero(~is_held & late).tolist()
    assert reader.held_out_rows().tolist() == np.flatnonzero(is_held & late).tolist()
    parts = [np.concatenate(list(reader.epoch_rows("resid_post.0", 1, part, 3))) for part in range(3)]
    assert np.sort(np.concatenate(parts)).tolist() == training.tolist()
    everything = LensRows(lens_archive, LensSettings(skip_positions=0))
    assert len(everything.training_rows(everything.chunks())) + len(everything.held_out_rows()) == lens_archive.n_rows


@pytest.mark.parametrize("group", [None, "author", "example"])
def test_documents_and_copies_are_held_out_as_a_whole(tmp_path: Path, group: str | None) -> None:
    texts = examples(20) * 2
    rows = [{"input_ids": ids, "author": number % 20 // 4} for number, ids in enumerate(texts)]
    archive = capture_dataset(
        TINY["llama"](), rows, out=tmp_path / "a.zarr", sites="resid_post.*", max_length=10, long_examples="split"
    ).archive
    reader = LensRows(archive, LensSettings(held_out=0.3, group=group))
    documents = archive.example_table.table(["source_index"])["source_index"].to_numpy()
    sides = [
        {int(documents[example]) % 20 for example in archive.rows.example[rows]}
        for rows in (reader.held_out_rows(), reader.training_rows(reader.chunks()))
    ]
    assert all(sides)
    assert bool(sides[0] & sides[1]) == (group == "example")
    if group == "author":
        assert {one // 4 for one in sides[0]} & {one // 4 for one in sides[1]} == set()


def test_few_rows_come_from_everywhere(lens_archive: Archive) -> None:
    reader = LensRows(lens_archive, LensSettings(rows=512, seed=5))
    chunks = reader.chunks()
    assert len(chunks) == 4
    assert chunks.max() > lens_archive.n_rows / 2
    assert not np.array_equal(chunks, np.arange(4) * 128)
    assert 256 < len(reader.training_rows(chunks)) <= 512


def test_an_unfinished_archive_evaluates_on_all_captured_held_out_rows(tmp_path: Path) -> None:
    """Held-out examples that are not captured do not count towards the most rows."""
    full = make_lens_archive(tmp_path / "a.zarr", rows_per_shard=64)
    expected = held_out_rows(full)
    take_back(full.path, *range(12, len(full.commits)))
    begun = Archive(full.path)
    expected = expected[expected < 12 * 64]
    reader, few = LensRows(begun, LensSettings()), len(expected) // 2
    assert reader.held_out_rows().tolist() == expected.tolist()
    assert 0.8 * few < len(reader.held_out_rows(few)) <= few
