"""Which of several processes this is, for messages."""

import torch.distributed as dist


def is_alone() -> bool:
    """Say whether there is only one process."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1


def on_rank() -> str:
    """Return `` on rank 3`` with a space in front; empty where there is only one process."""
    return "" if is_alone() else f" on rank {dist.get_rank()}"
