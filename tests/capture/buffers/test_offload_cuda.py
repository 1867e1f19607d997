"""Copies from a CUDA device: values, overlap, back-pressure, memory. `test_offload` tests their order."""

import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import residua
from residua.capture.buffers.host_buffers import ShardFiller
from residua.capture.buffers.row_index import BatchRows, ExampleRows, batch_rows
from residua.store.format.plan import Plan, SitePlan
from residua.store.format.writer import FilledShard, ShardWriter
from tests.capture.buffer_samples import LateWriter, make_plan
from tests.capture.manual_hooks import hooked
from tests.models.tiny import TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
HEIGHT, WIDTH = 512, 4096
TOKENS = [[3 + (number * 7 + at) % 60 for at in range(16)] for number in range(40)]
SITES = (
    SitePlan(name="resid_post.0", row_shape=(WIDTH,), dtype="float32", codec="raw"),
    SitePlan(name="resid_post.1", row_shape=(WIDTH,), dtype="bfloat16", codec="raw"),
)


class StuckWriter:
    """A disk that takes nothing until `go_on` is set; then it reads the shards."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self._threads: list[threading.Thread] = []
        self.n_shards = 0

    def submit(self, shard: FilledShard) -> None:
        thread = threading.Thread(target=self._write, args=(shard,))
        thread.start()
        self._threads.append(thread)

    def _write(self, shard: FilledShard) -> None:
        assert self.go_on.wait(timeout=60)
        shard.ready()
        self.n_shards += 1
        shard.release()

    def raise_failure(self) -> None:
        pass

    def join(self) -> None:
        for thread in self._threads:
            thread.join(timeout=60)


def plan_of(n_batches: int) -> Plan:
    return make_plan(HEIGHT, n_batches * HEIGHT, SITES)


def batch(number: int, step: int = 1) -> BatchRows:
    """Return a batch of one example that fills one shard; every `step`-th token is kept."""
    at = np.arange(HEIGHT * step)
    example = ExampleRows(
        example=number,
        first_row=number * HEIGHT,
        input_ids=at.astype(np.int32),
        positions=at[::step].astype(np.int32),
        padded=at.astype(np.int64),
    )
    return batch_rows([example], HEIGHT * step)


def fill(filler: ShardFiller, number: int, tensor: torch.Tensor, step: int = 1) -> None:
    filler.begin(batch(number, step))
    for site in SITES:
        filler.put(site.name, tensor)
    tensor.fill_(float("nan"))
    filler.finish()


@pytest.mark.parametrize("step", [1, 2])
def test_values_are_right_if_the_tensor_changes_afterwards(step: int) -> None:
    n_batches = 24
    writer = LateWriter()
    filler = ShardFiller(plan_of(n_batches), cast("ShardWriter", writer), n_buffers=2, pinned=True)
    expected = []
    for number in range(n_batches):
        tensor = torch.randn(1, HEIGHT * step, WIDTH, device="cuda")
        expected.append(tensor[0, ::step].cpu())
        fill(filler, number, tensor, step)
        del tensor
    shards = writer.close()
    assert sorted(shards) == list(range(n_batches))
    for shard, rows in enumerate(expected):
        assert np.array_equal(shards[shard]["resid_post.0"], rows.numpy())
        bits = rows.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(shards[shard]["resid_post.1"], bits)


def test_a_stuck_disk_blocks_the_producer_and_memory_does_not_grow() -> None:
    writer = StuckWriter()
    filler = ShardFiller(plan_of(12), cast("ShardWriter", writer), n_buffers=2, pinned=True)
    tensor = torch.zeros(1, HEIGHT, WIDTH, device="cuda")
    for number in range(2):
        fill(filler, number, tensor)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    done = threading.Event()

    def produce() -> None:
        for number in range(2, 12):
            fill(filler, number, tensor)
        done.set()

    producer = threading.Thread(target=produce)
    producer.start()
    assert not done.wait(timeout=0.5), "both buffers are being written"
    assert torch.cuda.memory_allocated() <= before
    writer.go_on.set()
    producer.join(timeout=60)
    writer.join()
    assert writer.n_shards == 12
    assert filler.stall_seconds > 0


def test_copies_overlap_with_the_model() -> None:
    """In a profile, some copy to the host overlaps a kernel of the compute stream."""
    writer = LateWriter()
    filler = ShardFiller(plan_of(24), cast("ShardWriter", writer), n_buffers=4, pinned=True)
    weights = torch.randn(WIDTH, WIDTH, device="cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for number in range(24):
            hidden = torch.randn(1, HEIGHT, WIDTH, device="cuda")
            filler.begin(batch(number))
            for site in SITES:
                filler.put(site.name, hidden)
                for _ in range(20):
                    hidden = torch.tanh(hidden @ weights)
            filler.finish()
        torch.cuda.synchronize()
    writer.close()
    spans = [(event.name, event.time_range.start, event.time_range.end) for event in found.events() or []]
    copies = [(start, end) for name, start, end in spans if "DtoH" in name]
    kernels = [(start, end) for name, start, end in spans if "gemm" in name.lower() or "tanh" in name.lower()]
    assert copies
    assert kernels
    assert any(start < k_end and k_start < end for start, end in copies for k_start, k_end in kernels)


@pytest.mark.parametrize("how", ["plain", "compiled", "on another stream"])
def test_a_model_is_captured_as_a_hook_by_hand_sees_it(how: str, tmp_path: Path) -> None:
    """Every batch is one example without padding, so that rows follow the calls."""
    model, kept = TINY["llama"](), list[torch.Tensor]()
    nn.Module.to(model, DEVICE)
    if how == "compiled":
        model.compile(backend="eager")
        with torch.inference_mode():
            model(torch.tensor([TOKENS[0]], device=DEVICE))
    block = model.get_submodule("model.layers.1")
    other: Any = torch.cuda.Stream  # torch leaves it bare
    stream = torch.cuda.stream(other()) if how == "on another stream" else nullcontext()
    with hooked(block, lambda _m, _a, output: kept.append(output.detach().clone())), stream:
        options: dict[str, Any] = {"sites": "resid_post.1", "codec": "raw", "batch_tokens": len(TOKENS[0])}
        result = residua.capture_dataset(model, TOKENS, out=tmp_path / "a.zarr", **options)
        expected = torch.cat([output[0] for output in kept if output.shape[1] == len(TOKENS[0])]).cpu()
    assert len(expected) == result.archive.n_rows == len(TOKENS) * len(TOKENS[0])
    assert torch.equal(result.archive["resid_post.1"].torch(), expected)
