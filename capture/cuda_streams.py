"""The two streams of a CUDA device, as `offload` asks for them."""

from contextlib import AbstractContextManager

import torch


class CudaStreams:
    """The stream that the model runs on, whichever that is at each call, and a side stream of our own.

    Args:
        device: A CUDA device with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it bare

    def mark_compute(self) -> torch.cuda.Event:
        """Record an event behind what the model has queued so far."""
        return self._mark(torch.cuda.current_stream(self._device))

    def hold_side(self, event: torch.cuda.Event) -> None:
        """Let the side stream wait for `event`; the caller does not."""
        self._side.wait_event(event)

    def side(self) -> AbstractContextManager[object]:
        """Return a context in which copies are queued on the side stream."""
        return torch.cuda.stream(self._side)

    def mark_side(self) -> torch.cuda.Event:
        """Record an event behind the copies queued so far."""
        return self._mark(self._side)

    def _mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it bare
        event.record(stream)
        return event
