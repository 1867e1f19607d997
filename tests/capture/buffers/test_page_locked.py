"""Host buffers for a CUDA device: page-locked memory, exactly as large as the rows, freed with the last view."""

import gc
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from residua.capture.buffers.host_buffers import HostBuffer
from residua.capture.runtime.devices import input_device
from residua.capture.runtime.streams import writer_threads
from residua.store.base.errors import CaptureError
from residua.store.format.plan import SitePlan
from tests.capture.buffer_samples import make_plan

SITES = (
    SitePlan(name="resid_post.0", row_shape=(33,), dtype="bfloat16", codec="fast"),
    SitePlan(name="logits_top2.indices", row_shape=(2,), dtype="int64", codec="raw"),
    SitePlan(name="q.1", row_shape=(3, 5), dtype="float32", codec="raw"),
)
N_ROWS = 7
PAGE = 4096


class Runtime:
    """The calls of CUDA's runtime that are used; it records locked memory, and registers no page twice."""

    def __init__(self, error: int = 0) -> None:
        self.locked: dict[int, int] = {}
        self._error = error

    def cudaHostRegister(self, address: int, n_bytes: int, flags: int) -> int:  # noqa: N802  # CUDA's name
        taken = {page for start, size in self.locked.items() for page in pages(start, size)}
        if taken & set(pages(address, n_bytes)):
            return 712  # cudaErrorHostMemoryAlreadyRegistered
        self.locked[address] = n_bytes
        return self._error

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802  # CUDA's name
        del self.locked[address]
        return 0


def pages(address: int, n_bytes: int) -> range:
    return range(address // PAGE, (address + n_bytes - 1) // PAGE + 1)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    found = Runtime()
    monkeypatch.setattr("torch.cuda.cudart", lambda: found)
    return found


def make_buffer() -> HostBuffer:
    return HostBuffer(make_plan(8, N_ROWS, SITES), N_ROWS, pinned=True)


def test_a_buffer_takes_the_bytes_of_its_rows_and_no_more(runtime: Runtime) -> None:
    buffer = make_buffer()
    assert sorted(runtime.locked.values()) == sorted(site.row_bytes * N_ROWS for site in SITES)
    for site in SITES:
        (block,) = buffer.blocks[site.name]
        assert block.data_ptr() in runtime.locked
        assert (tuple(block.shape), str(block.dtype)) == ((N_ROWS, *site.row_shape), f"torch.{site.dtype}")
        block.copy_(torch.arange(block.numel()).view(block.shape))
        assert buffer.rows(site.name, N_ROWS).shape == block.shape


def test_memory_is_unlocked_with_the_last_view_of_its_rows(runtime: Runtime) -> None:
    buffer = make_buffer()
    rows = buffer.rows("q.1", 3)
    del buffer
    gc.collect()
    assert list(runtime.locked.values()) == [3 * 5 * 4 * N_ROWS], "a writer may still read these"
    del rows
    gc.collect()
    assert runtime.locked == {}


def test_memory_that_cannot_be_locked_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.cudart", lambda: Runtime(error=2))
    with pytest.raises(CaptureError, match=r"CUDA error 2\): lower host_memory="):
        make_buffer()


def test_several_threads_write_if_the_model_is_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 2)
    assert writer_threads(model) == 1
    host, device = (SimpleNamespace(is_meta=False, device=torch.device(name)) for name in ("cpu", "cuda:1"))
    on_device = SimpleNamespace(parameters=lambda: iter([host, device]))
    hook = SimpleNamespace(hooks=[SimpleNamespace(), SimpleNamespace(execution_device="cuda:1")])
    offloaded = SimpleNamespace(
        parameters=lambda: iter([SimpleNamespace(is_meta=True)]),
        modules=lambda: iter([SimpleNamespace(), SimpleNamespace(_hf_hook=hook)]),
    )
    assert input_device(cast("torch.nn.Module", offloaded)) == torch.device("cuda:1")
    for n_cores, n_threads in ((64, 4), (2, 2), (None, 1)):
        monkeypatch.setattr("os.cpu_count", lambda n_cores=n_cores: n_cores)
        for model_on_device in (on_device, offloaded):
            assert writer_threads(cast("torch.nn.Module", model_on_device)) == n_threads
