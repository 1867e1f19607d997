"""Jobs for workers, in a module of their own, since workers import the functions that they run."""

import os
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import distributed
import numpy as np
import numpy.typing as npt
import torch

from residua.analysis.rows.blocks import Block
from residua.analysis.support.open_archives import opened
from residua.store.base.errors import DamagedArchiveError
from residua.store.read.mapped import OPEN_SHARDS


def gram(path: str, block: Block) -> npt.NDArray[np.float64]:
    """Return the Gram matrix of the rows of a block."""
    values = opened(path)["resid_post.0"][slice(*block)].astype(np.float64)
    return values.T @ values


def die_once(marks: str, number: int) -> int:
    """Return the square of a number; number 2 kills its worker at the first attempt."""
    mark = Path(marks) / "died"
    if number == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def threads_seen(_: int) -> int:
    """Return the number of torch threads, and set another one."""
    found = torch.get_num_threads()
    torch.set_num_threads(3)
    return found


def fail(number: int) -> int:
    """Raise one of two errors."""
    if number == 1:
        raise DamagedArchiveError("shard 1 is damaged: restore it")
    raise KeyError("three")


def take_memory(n_bytes: int) -> None:
    """Allocate and use memory until the worker is ended."""
    kept = []
    while True:
        kept.append(np.ones(n_bytes, np.uint8))
        time.sleep(0.01)  # the nanny looks ten times a second


class State(NamedTuple):
    """A worker's process number, and the bytes it has mapped and spilled."""

    process: int
    mapped_bytes: int
    spilled_bytes: int


def state_of_worker(_: int) -> State:
    """Return the state of this worker."""
    get: Any = distributed.get_worker
    spilled = getattr(get().data, "spilled_total", None)
    return State(os.getpid(), OPEN_SHARDS.n_bytes, spilled.disk if spilled else 0)
