"""One stage's rule: nobody reads it before the copies into it are done, and what is copied stays alive so long.

What needs a device is tested on one; the order of events is tested everywhere, with events that are as late as can be.
"""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import numpy as np
import pytest
import torch

from residua.capture import staging as module
from residua.capture.rows import ExampleRows, batch_rows
from residua.capture.staging import Stage, Staging
from residua.store.plan import SitePlan
from residua.store.writer import ShardWriter
from tests.capture.test_staging import LateWriter, make_plan


class LazyEvent:
    """An event whose copy happens only when somebody waits for it, as late as a device may make it."""

    def __init__(self, buffer: torch.Tensor, value: float) -> None:
        self._buffer, self._value = buffer, value

    def synchronize(self) -> None:
        self._buffer.fill_(self._value)


def expect(stage: Stage, row: int, rows: torch.Tensor) -> None:
    event = LazyEvent(stage.buffers["resid_post.0"][row], float(row + 1))
    stage.expect(cast("torch.cuda.Event", event), rows)


def test_waiting_ends_after_every_copy_and_frees_what_was_copied() -> None:
    stage = Stage(make_plan(4, None), 4, pinned=False)
    alive = []
    for row in range(4):
        rows = torch.zeros(8)
        alive.append(weakref.ref(rows))
        expect(stage, row, rows)
        del rows
    gc.collect()
    assert all(ref() is not None for ref in alive), "memory under a copy stays where it is"
    stage.wait()
    assert stage.rows("resid_post.0", 4).tolist() == [[row + 1.0] * 2 for row in range(4)]
    gc.collect()
    assert all(ref() is None for ref in alive)


def test_every_writer_thread_waits_for_all_copies() -> None:
    stage = Stage(make_plan(4, None), 4, pinned=False)
    entered, go_on = threading.Event(), threading.Event()

    class BlockedEvent:
        def synchronize(self) -> None:
            entered.set()
            assert go_on.wait(timeout=60)
            stage.buffers["resid_post.0"].fill_(5)

    stage.expect(cast("torch.cuda.Event", BlockedEvent()), torch.zeros(1))
    with ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(stage.wait) for _ in range(2)]
        assert entered.wait(timeout=60)
        assert not any(wait.done() for wait in waits), "the second one finds the list empty and must still wait"
        go_on.set()
    assert stage.rows("resid_post.0", 1).tolist() == [[5.0, 5.0]]


def test_rows_on_the_device_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DEVICE_BYTES", 100)
    stage = Stage(make_plan(4, None), 4, pinned=False)
    stage.buffers["resid_post.0"].zero_()
    for row in range(4):
        expect(stage, row, torch.zeros(12))
    assert stage.rows("resid_post.0", 4)[:, 0].tolist() == [1, 2, 0, 0], "48 bytes each: two may wait"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kept", ["all", "every second"])
def test_copies_from_a_device_are_right_though_the_tensor_changes_afterwards(kept: str) -> None:
    height, width, n_batches = 512, 4096, 24
    sites = (
        SitePlan(name="resid_post.0", row_shape=(width,), dtype="float32", codec="raw"),
        SitePlan(name="resid_post.1", row_shape=(width,), dtype="bfloat16", codec="raw"),
    )
    step = 1 if kept == "all" else 2
    n_positions = height * step
    writer = LateWriter()
    plan = make_plan(height, n_batches * height, sites)
    staging = Staging(plan, cast("ShardWriter", writer), n_stages=2, pinned=True)
    sums = []
    for number in range(n_batches):
        tensor = torch.randn(1, n_positions, width, device="cuda")
        sums.append(tensor[0, ::step].double().sum().item())
        at = np.arange(n_positions)
        example = ExampleRows(
            example=number,
            first_row=number * height,
            input_ids=at.astype(np.int32),
            positions=at[::step].astype(np.int32),
            padded=at.astype(np.int64),
        )
        staging.begin(batch_rows([example], n_positions))
        for site in sites:
            staging.put(site.name, tensor)
        tensor.fill_(float("nan"))
        del tensor
        staging.finish()
    for shard, arrays in writer.close().items():
        stored = arrays["resid_post.0"].astype(np.float64)
        assert np.isclose(stored.sum(), sums[shard], rtol=1e-9, atol=1e-6)
        expected = torch.from_numpy(arrays["resid_post.0"].astype(np.float32)).to(torch.bfloat16).view(torch.int16)
        assert np.array_equal(arrays["resid_post.1"], expected.numpy().view(np.uint16))
