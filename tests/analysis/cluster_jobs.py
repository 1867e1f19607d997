"""Functions for workers of a cluster, in their own module, because workers import the functions that they run."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import distributed
import numpy as np
import numpy.typing as npt

from residua.analysis.rows.blocks import Block
from residua.analysis.support.kept import kept_bytes
from residua.analysis.support.open_archives import Location, opened
from residua.store.base.errors import DamagedArchiveError
from residua.store.base.naming import named
from residua.store.read.mapped import OPEN_SHARDS


def gram(where: Location, block: Block) -> npt.NDArray[np.float64]:
    """Return the Gram matrix of the rows of a block."""
    values = opened(where)["resid_post.0"][slice(*block)].astype(np.float64)
    return values.T @ values


def kill_worker_once(folder: str, number: int) -> int:
    """Return the square of a number; the first call with number 2 kills its worker."""
    killed = Path(folder) / "killed"
    if number == 2 and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def leaf_or_kill(folder: str, leaf: int) -> list[int]:
    """Return the number of a leaf; the first call with leaf 5 kills its worker."""
    return [leaf] if kill_worker_once(folder, 2 if leaf == 5 else 0) is not None else []


def joined(first: list[int], second: list[int]) -> list[int]:
    """Append the second list to the first, which changes."""
    first += second
    return first


def leaf_that_fails(_: str, leaf: int) -> list[int]:
    """Raise DamagedArchiveError for leaf 6."""
    return [fail(1)] if leaf == 6 else [leaf]


def kept_here(_: int) -> int:
    """Return the bytes that this worker keeps."""
    return kept_bytes()


def report(job: int, send: Callable[[tuple[float, float]], object]) -> int:
    """Report twice, and return the job."""
    for step in range(2):
        send((step, job))
    return job


def say(_: int) -> str:
    """Return the name of a setting, as a message has it."""
    return named("memory_limit")


def threads_seen(_: int) -> int:
    """Return the number of torch threads, and set another number."""
    import torch  # not above: a worker that runs other jobs starts in half the time

    found = torch.get_num_threads()
    torch.set_num_threads(3)
    return found


def fail(number: int) -> int:
    """Raise DamagedArchiveError for number 1, and KeyError for others."""
    if number == 1:
        raise DamagedArchiveError("shard 1 is damaged: restore it")
    raise KeyError("three")


def take_memory(n_bytes: int) -> None:
    """Allocate and use memory until the nanny ends the worker."""
    kept = []
    while True:
        kept.append(np.ones(n_bytes, np.uint8))
        time.sleep(0.01)  # the nanny measures memory ten times a second


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
