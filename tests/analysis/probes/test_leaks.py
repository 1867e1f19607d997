"""Labels drawn at random for each document give chance level, however the documents are cut and copied."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from residua.analysis.probes.probe import probe
from residua.store.read.archive import Archive
from tests.analysis.rows_archive import write_rows

SITE = "resid_post.0"
N_CONTENTS, N_ROWS = 40, 4  # rows of a window
WIDTH = 64  # more than there are contents, so that a probe can learn any label of any content


class Case(NamedTuple):
    """Of each example, the content that it shows and the document that it comes from."""

    content: npt.NDArray[np.int64]
    document: npt.NDArray[np.int64]


def windows() -> Case:
    content = np.repeat(np.arange(N_CONTENTS), 6)
    return Case(content, content)


def copies() -> Case:
    content = np.tile(np.arange(N_CONTENTS), 6)
    return Case(content, np.arange(len(content)))


def windows_of_copies() -> Case:
    content = np.tile(np.repeat(np.arange(N_CONTENTS), 3), 2)
    return Case(content, content + N_CONTENTS * np.repeat([0, 1], 3 * N_CONTENTS))


def make(path: Path, case: Case, n_labels: int = 2) -> Archive:
    """Write rows that say which content they show, and give each content labels at random."""
    rng = np.random.default_rng(0)
    n_examples = len(case.content)
    number_in_document = [int((case.document[:i] == case.document[i]).sum()) for i in range(n_examples)]
    contents = [[int(c) + 50, *rng.integers(1, 99, 20), n] for c in range(N_CONTENTS) for n in range(6)]
    shown = rng.standard_normal((N_CONTENTS, WIDTH))[np.repeat(case.content, N_ROWS)]
    values = 3 * shown + rng.standard_normal((n_examples * N_ROWS, WIDTH))
    labels = np.arange(N_CONTENTS) % n_labels
    columns: dict[str, Any] = {
        "source_index": case.document.tolist(),
        "author": [int(c) // 2 for c in case.content],
        **{f"label{i}": rng.permutation(labels)[case.content].astype(str).tolist() for i in range(5)},
        **{f"number{i}": rng.standard_normal(N_CONTENTS)[case.content].tolist() for i in range(5)},
        **{
            f"of_author{i}": rng.permutation(labels[: N_CONTENTS // 2])[case.content // 2].astype(str).tolist()
            for i in range(5)
        },
        "rare": ["yes" if c < 4 else "no" for c in case.content],
    }
    return write_rows(
        path,
        [N_ROWS] * n_examples,
        {SITE: values.astype(np.float32)},
        columns=columns,
        input_ids=[contents[6 * int(c) + n] for c, n in zip(case.content, number_in_document, strict=True)],
        rows_per_shard=1024,
    )


def mean_scores(archive: Archive, name: str, scores: tuple[str, ...], **asked: Any) -> list[float]:
    found = [probe(archive, f"{name}{i}", SITE, seed=i, **asked).to_pylist()[0] for i in range(5)]
    return [float(np.mean([one[score] for one in found])) for score in scores]


@pytest.mark.parametrize("cut", [windows, copies, windows_of_copies])
def test_labels_at_random_give_chance_level(cut: Callable[[], Case], tmp_path: Path) -> None:
    archive = make(tmp_path / "a.zarr", cut())
    balanced, control = mean_scores(archive, "label", ("balanced_accuracy", "control_balanced_accuracy"))
    assert balanced == pytest.approx(0.5, abs=0.15)  # 1.0 if a document or its copies are on both sides
    assert control == pytest.approx(0.5, abs=0.15)
    explained, of_control = mean_scores(archive, "number", ("r2", "control_r2"))
    assert explained < 0.1
    assert of_control < 0.1


@pytest.mark.parametrize("cut", [windows, copies, windows_of_copies])
def test_the_control_shows_what_leaks_if_examples_are_held_out(cut: Callable[[], Case], tmp_path: Path) -> None:
    archive = make(tmp_path / "a.zarr", cut())
    scores = ("balanced_accuracy", "control_balanced_accuracy", "control_accuracy", "control_majority_accuracy")
    balanced, control, accuracy, majority = mean_scores(archive, "label", scores, group="example")
    assert balanced > 0.9
    assert control > 0.9
    assert accuracy > majority + 0.3


def test_copies_that_are_documents_leak_if_their_content_may_be_divided(tmp_path: Path) -> None:
    archive = make(tmp_path / "a.zarr", copies())
    assert (
        min(mean_scores(archive, "label", ("balanced_accuracy", "control_balanced_accuracy"), group="source_index"))
        > 0.9
    )


def test_a_users_column_is_held_out_as_a_whole(tmp_path: Path) -> None:
    archive = make(tmp_path / "a.zarr", windows_of_copies())
    scores = ("balanced_accuracy", "control_balanced_accuracy")
    assert mean_scores(archive, "of_author", scores, group="author") == pytest.approx([0.5, 0.5], abs=0.2)


def test_a_constant_guess_is_no_leak(tmp_path: Path) -> None:
    """One label in ten is rare: always to answer the other is right nine times, for the control as well."""
    (found,) = probe(make(tmp_path / "a.zarr", windows()), "rare", SITE).to_pylist()
    assert found["control_majority_accuracy"] > 0.8
    assert found["control_accuracy"] < found["control_majority_accuracy"] + 0.05
    assert found["majority_balanced_accuracy"] == 0.5
    assert found["control_balanced_accuracy"] < 0.65
