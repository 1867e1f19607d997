"""Batches on the device of a computation: on CUDA, the next one is copied from pinned memory while this one is used.

A copy runs on a stream of its own. The stream that computes waits for its event before a batch is handed out, and a
batch's memory is not given to another copy before what computes with it is done (`Tensor.record_stream`).
"""

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from residua.store.base.errors import AnalysisError
from residua.store.base.naming import named
from residua.store.format.site_aliases import BySite

Batch: TypeAlias = dict[str, Tensor]


def checked_device(device: torch.device | str | None) -> torch.device | None:
    """Return the device that `device` names, if any.

    Raises:
        AnalysisError: There is no such device.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise AnalysisError(f"{named('device', device)} is none that torch knows: give cpu or cuda:0") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise AnalysisError(f"{named('device', device)} is not there: torch finds {torch.cuda.device_count()} of CUDA")
    return found


def on_device(batches: Iterator[Batch], device: torch.device | None) -> Iterator[Batch]:
    """Return batches on `device`; as they are if that is None. On CUDA one batch is read and copied ahead."""
    if device is None:
        return batches
    if device.type == "cuda":
        return _copied_ahead(batches, device)
    return (BySite({name: values.to(device) for name, values in batch.items()}) for batch in batches)


def _copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it so
    ahead: tuple[Batch, Batch, torch.cuda.Event] | None = None
    for batch in batches:
        pinned = {name: values if values.is_pinned() else values.pin_memory() for name, values in batch.items()}
        with torch.cuda.stream(copies):
            sent = BySite({name: values.to(device, non_blocking=True) for name, values in pinned.items()})
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # nor this
        copied.record(copies)
        following = sent, pinned, copied  # pinned memory stays until its copy is waited for
        if ahead is not None:
            yield _arrived(ahead, device)
        ahead = following
    if ahead is not None:
        yield _arrived(ahead, device)


def _arrived(ahead: tuple[Batch, Batch, torch.cuda.Event], device: torch.device) -> Batch:
    sent, _, copied = ahead
    computing = torch.cuda.current_stream(device)
    computing.wait_event(copied)
    for values in sent.values():
        values.record_stream(computing)
    return sent
