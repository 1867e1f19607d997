"""Captures of models that several ranks hold together: the archive of one process, except for rounding.

There is one test for each launch, because starting ranks takes time; the same facts are checked for each case.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from residua.store.format.plan import Plan
from residua.store.read.archive import Archive
from residua.store.verification.verify import verify
from tests.distributed.model_parallel.capture_cases import CASES, capture, is_recorded
from tests.distributed.model_parallel.recorder_loop import record
from tests.forking import ForkedWorkers, launched
from tests.models.tiny import SPLIT
from tests.plain_zarr import plain_array
from tests.stopped import content

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SECONDS = 480
CASES_MODULE = "tests.distributed.model_parallel.capture_cases"
BOUNDS = {"float32": 2e-5, "float64": 5e-7}
MOST_OF_ONE_RANK = 0.3
EXACT = ("head/", "rows/", "examples/")
"""What depends on no rounding; the config says whether the model was loaded from a folder."""


def launch(forked_workers: ForkedWorkers, folder: Path, n: int) -> dict[str, list[dict[str, Any]]]:
    """Capture all cases of `n` ranks; return what each worker of each says that it did."""
    ended = forked_workers.run(launched([str(folder)], n, module=CASES_MODULE), SECONDS)
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    failures = [f"{name}: {said['failure']}" for name, said in found.items() if "failure" in said]
    assert not failures, "\n".join(failures)
    assert found.keys() == CASES[n].keys(), ended
    return {name: said["workers"] for name, said in found.items()}


class OneProcess:
    """What one process captures and records; the same for all layouts and launches, so it is made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[object, ...], Path] = {}

    def captured(self, name: str, like: Archive) -> Archive:
        def make(out: Path) -> None:
            capture(model_of(name, like), out, ",".join(like.sites))

        return self._once(("captured", *_made_of(name, like)), make)

    def recorded(self, name: str, like: Archive, n_calls: int) -> Archive:
        def make(out: Path) -> None:
            record(model_of(name, like), out, ",".join(like.sites), n_calls=n_calls)

        return self._once(("recorded", n_calls, *_made_of(name, like)), make)

    def _once(self, what: tuple[object, ...], make: Callable[[Path], None]) -> Archive:
        if what not in self._made:
            self._made[what] = self._folder / f"{len(self._made)}.zarr"
            make(self._made[what])
        return Archive(self._made[what])


def _made_of(name: str, like: Archive) -> tuple[object, ...]:
    return name, like.plan.model["dtype"], like.sites


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> OneProcess:
    return OneProcess(tmp_path_factory.mktemp("one process"))


def model_of(name: str, like: Archive) -> PreTrainedModel:
    model = SPLIT[name]()
    for parameter in model.parameters():
        parameter.data = parameter.data.double() if like.plan.model["dtype"] == "float64" else parameter.data
    return model


def largest_error(got: Archive, wanted: Archive) -> float:
    errors = [0.0]
    for site in wanted.sites:
        ours, theirs = (np.asarray(archive[site].numpy(), np.float64) for archive in (got, wanted))
        errors.append(float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
    return max(errors)


@pytest.mark.parametrize("n", CASES)
def test_split_models_write_the_archive_of_one_process(
    forked_workers: ForkedWorkers, one_process: OneProcess, n: int, tmp_path: Path
) -> None:
    workers = launch(forked_workers, tmp_path, n)
    for case, did in workers.items():
        archive, name = Archive(tmp_path / f"{case}.zarr"), case.partition("-")[0]
        wanted = one_process.captured(name, archive)
        assert without_columns(archive.plan) == wanted.plan, case
        assert largest_error(archive, wanted) <= BOUNDS[str(archive.plan.model["dtype"])], case
        written, expected = content(archive.path), content(wanted.path)
        assert written.keys() == expected.keys() or "columns" in case, "the same files, whoever wrote them"
        exact = [path for path in expected if path.startswith(EXACT) and path != "head/config.json"]
        assert [written[path] for path in exact] == [expected[path] for path in exact], case
        report = verify(archive.path)
        assert (report.problems, report.notes) == ([], []), case
        check_figures(case, did, archive)
        check_recorded(case, tmp_path, one_process)
    check_launch(n, tmp_path, workers)


def check_recorded(case: str, folder: Path, one_process: OneProcess) -> None:
    """What a loop of the user's own recorded is what it records in one process, on each replica."""
    paths = sorted(folder.glob(f"{case}.recorded.*.zarr"))
    n_replicas = 2 if case.endswith(("-dp2", "-fsdp2")) else 1
    assert len(paths) == (n_replicas if is_recorded(case) else 0), case
    for path in paths:
        archive, name = Archive(path), case.partition("-")[0]
        n_calls = len(set(archive.examples.column("call").to_pylist()))
        wanted = one_process.recorded(name, archive, n_calls)
        assert (archive.is_sealed, archive.plan, archive.n_rows) == (True, wanted.plan, wanted.n_rows), case
        assert archive.examples.equals(wanted.examples), case
        assert largest_error(archive, wanted) <= BOUNDS[str(archive.plan.model["dtype"])], case
        written, expected = content(path), content(wanted.path)
        assert written.keys() == expected.keys(), case
        exact = [file for file in expected if file.startswith(EXACT) and file != "head/config.json"]
        assert [written[file] for file in exact] == [expected[file] for file in exact], case
        report = verify(path)
        assert (report.problems, report.notes) == ([], []), case


def check_figures(case: str, workers: list[dict[str, Any]], archive: Archive) -> None:
    """Every row is offloaded once and counted once, whatever the number of ranks."""
    stats = [worker["stats"] for worker in workers]
    row_bytes = sum(site.row_bytes for site in archive.plan.sites)
    assert sum(s["offloaded_bytes"] for s in stats) == row_bytes * archive.n_rows, case
    assert sum(s["logical_bytes"] for s in stats) == row_bytes * archive.n_rows, case
    assert sum(s["committed_rows"] for s in stats) == archive.n_rows, case
    assert sum(s["stored_bytes"] for s in stats) == sum(
        file.n_bytes for commit in archive.commits.values() for file in commit.arrays.values()
    )
    sends_nothing = case.endswith("-pp2") or "columns" in case
    assert all((s["sent_bytes"] == 0) == sends_nothing for s in stats), case


def without_columns(plan: Plan) -> Plan:
    return replace(plan, sites=tuple(replace(site, column_shards=1) for site in plan.sites))


def check_columns(path: Path, n: int) -> None:
    """What is split is a Zarr array that is sharded along axis 1, with a file of each rank, and any reader sees one."""
    archive = Archive(path)
    cut = {site.name for site in archive.plan.sites if site.column_shards == n}
    assert cut >= {"q.0", "q.1", "q.2"}
    assert not any(name.startswith("resid") for name in cut)
    for name in cut:
        node = archive.plan.site(name).path
        assert sorted(file.name for file in (path / node / "c" / "0").iterdir()) == [str(i) for i in range(n)]
        assert np.array_equal(plain_array(path, node), archive[name].numpy())


def check_launch(n: int, folder: Path, workers: dict[str, list[dict[str, Any]]]) -> None:
    """What only some cases show."""
    check_columns(folder / "llama-columns.zarr", n)
    if n == 2:
        assert Archive(folder / "llama-pp2.zarr").provenance["model"]["layout"] == "pipeline 2"  # type: ignore[index]
        return
    shares = [worker["stats"]["offloaded_bytes"] for worker in workers["llama-balanced"]]
    assert max(shares) <= MOST_OF_ONE_RANK * sum(shares), "every link carries its share"
    sent = sum(worker["stats"]["sent_bytes"] for worker in workers["llama-balanced"])
    archive = Archive(folder / "llama-balanced.zarr")
    split = sum(site.row_bytes for site in archive.plan.sites if not site.name.startswith("resid")) * archive.n_rows
    assert 0.7 * split < sent < 0.8 * split, "three quarters of what is split, and nothing else"
