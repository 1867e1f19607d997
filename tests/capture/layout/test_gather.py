"""Two ranks, forked and joined by gloo: a function that is interrupted, and a layout that changes with the batch."""

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from numcodecs.checksum32 import CRC32C
from torch import Tensor

from residua.capture.layout.gather import run_once
from residua.capture.layout.layouts import Layout, ProvedLayouts, ShardReport, shard_reports
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


def test_each_rank_reports_what_it_has_of_a_tensor_by_one_collective(tmp_path: Path) -> None:
    tensors = [
        torch.arange(12.0).view(3, 4)[:, ::2],
        torch.ones(2, 0, 5, dtype=torch.bfloat16),
        torch.tensor(7),
        torch.ones((1,) * 30, dtype=torch.float8_e4m3fn),
    ]

    def work(rank: int, group: Group) -> str:
        with mock.patch.object(dist, "all_gather_object", side_effect=AssertionError("two collectives")):
            mine = [tensor.to(torch.float64) if rank and not i else tensor for i, tensor in enumerate(tensors)]
            with torch.inference_mode():
                return repr([shard_reports(tensor, group) for tensor in mine])

    first, second = on_two_ranks(work, tmp_path)
    assert first == second
    wanted = []
    for number, tensor in enumerate(tensors):
        here = [tensor, tensor.double() if number == 0 else tensor]
        found = [(str(each.dtype), other_crc32c(each)) for each in here]
        wanted.append([ShardReport(rank, tuple(tensor.shape), dtype, crc) for rank, (dtype, crc) in enumerate(found)])
    assert first == repr(wanted)


def other_crc32c(tensor: Tensor) -> int:
    """The crc32c of a tensor's bytes, by another library than ours."""
    raw = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
    return int.from_bytes(CRC32C().encode(raw)[-4:], "little")


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
