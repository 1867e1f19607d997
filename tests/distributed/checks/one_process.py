"""What one process gives, to compare with: computed by the rank that needs it first, and kept for all launches."""

import fcntl
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def computed_once(name: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return what `compute` returns, from the folder of the launches if a rank of any launch has computed it.

    Args:
        name: What it is; another name for another result.
        compute: Makes it in this process alone: no collective may be in it. Tensors, numbers, and collections of them.
    """
    path = Path(sys.argv[1]) / "one process" / f"{name}.pt"
    path.parent.mkdir(exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            torch.save(dict(compute()), path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found
