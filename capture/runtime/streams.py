"""CUDA streams for copies, page-locked host memory, and the number of writer threads.

`CudaStreams` implements the `Streams` protocol of `residua.capture.buffers.offload`.
"""

import mmap
import os
import weakref
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from residua.capture.runtime.devices import runs_on_cuda
from residua.store.base.errors import CaptureError
from residua.store.base.naming import named

_MAX_WRITERS = 4


class CudaStreams:
    """The current stream of the model's device, looked up at each call, and a side stream for copies.

    Args:
        device: A CUDA device with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it bare

    def mark_compute(self) -> torch.cuda.Event:
        """Record an event after what the model has queued so far."""
        return self._mark(torch.cuda.current_stream(self._device))

    def hold_side(self, event: torch.cuda.Event) -> None:
        """Let the side stream wait for `event`; the caller does not."""
        self._side.wait_event(event)

    def side(self) -> AbstractContextManager[object]:
        """Return a context in which copies are queued on the side stream."""
        return torch.cuda.stream(self._side)

    def mark_side(self) -> torch.cuda.Event:
        """Record an event after the copies that are queued so far."""
        return self._mark(self._side, is_waited_for=True)

    def _mark(self, stream: torch.cuda.Stream, *, is_waited_for: bool = False) -> torch.cuda.Event:
        # A writer that waits for a blocking event sleeps; otherwise it would spin and take a core from the encoder.
        event = torch.cuda.Event(blocking=is_waited_for)  # type: ignore[no-untyped-call]  # torch leaves it bare
        event.record(stream)
        return event


def page_locked(n_bytes: int) -> npt.NDArray[np.uint8]:
    """Return `n_bytes` of page-locked host memory, to which a device copies without the processor.

    Torch's allocator rounds up to a power of two and keeps freed memory, so it may take twice what the user allowed.
    Here pages of the system are registered, and released when nobody holds a view of them any more.

    Raises:
        CaptureError: The system does not allow so much memory to be page-locked.
    """
    # The memory has pages of its own: a page that two allocations share cannot be registered twice.
    pages = mmap.mmap(-1, max(1, n_bytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = np.frombuffer(pages, np.uint8)
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch leaves it bare
    failure = int(runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
    if failure:
        raise CaptureError(
            f"{n_bytes:,} bytes of host memory cannot be page-locked for copies from the GPU (CUDA error {failure}): "
            f"lower {named('host_memory')}, or raise the limit on locked memory (ulimit -l)"
        )
    # Not at the end of the interpreter, when the driver may be gone: the system unlocks the pages then.
    weakref.finalize(memory, runtime.cudaHostUnregister, memory.ctypes.data).atexit = False
    return memory


def writer_threads(model: nn.Module) -> int:
    """Return the default number of threads that encode and write: more if a GPU leaves the processor's cores idle."""
    if not runs_on_cuda(model):
        return 1
    return min(_MAX_WRITERS, os.cpu_count() or 1)
