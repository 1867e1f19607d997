"""Two ranks, forked and joined by gloo: a function that is interrupted, and a layout that changes with the batch."""

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from residua.capture.layout.gather import run_once
from residua.capture.layout.layouts import Layout, ProvedLayouts
from residua.store.base.errors import CaptureError

SECONDS = 200
Group = Any


def rank_main(work: Callable[[int, Group], str], rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    where = f"file://{folder}/store"
    dist.init_process_group("gloo", where, rank=rank, world_size=2, timeout=timedelta(seconds=SECONDS))
    (folder / f"{rank}").write_text(work(rank, dist.group.WORLD))


def on_two_ranks(work: Callable[[int, Group], str], folder: Path) -> list[str]:
    """Return what each of two ranks returns; a rank that hangs fails the test."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=rank_main, args=(work, rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
        assert process.exitcode == 0
    return [(folder / f"{rank}").read_text() for rank in range(2)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, GeneratorExit])
def test_whatever_ends_the_function_on_the_owner_ends_it_on_every_rank(
    error: type[BaseException], tmp_path: Path
) -> None:
    def work(_rank: int, group: Group) -> str:
        def function(_full: Tensor) -> Tensor | None:
            raise error("stopped by hand")

        try:
            run_once(torch.ones(2, 3), Layout(), group, function, "resid_post.1")
        except BaseException as raised:  # noqa: BLE001  # it is the result
            return f"{type(raised).__name__}: {raised}"
        return "nothing was raised"

    owner, other = on_two_ranks(work, tmp_path)
    assert owner == f"{error.__name__}: stopped by hand"
    assert other.startswith("CaptureError")
    assert f"{error.__name__}: stopped by hand" in other


def test_a_layout_that_changes_with_the_batch_is_proved_again(tmp_path: Path) -> None:
    """Positions are split where their number is even; later the ranks have partial sums."""

    def work(rank: int, group: Group) -> str:
        layouts, found = ProvedLayouts(), []

        def layout(tensor: Tensor, n_positions: int) -> Layout:
            full = (2, n_positions, 6)
            return layouts.of("mlp_out.0", tensor, full, group, batch_shape=(2, n_positions))

        for n_positions in (5, 4, 5, 4, 8):
            full = torch.arange(2.0 * n_positions * 6).view(2, n_positions, 6)
            here = full.chunk(2, 1)[rank] if n_positions % 2 == 0 else full
            found.append(str(layout(here, n_positions)))
        try:
            layout(torch.full((2, 7, 6), float(rank)), 7)
        except CaptureError as error:
            found.append("partial sums" if "partial sums" in str(error) else str(error))
        return "\n".join(found)

    expected = [Layout(), Layout(1, (2, 2)), Layout(), Layout(1, (2, 2)), Layout(1, (4, 4))]
    for found in on_two_ranks(work, tmp_path):
        assert found.splitlines() == [*map(str, expected), "partial sums"]
