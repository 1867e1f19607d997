"""Which of several processes this is, for messages."""

import torch.distributed as dist


def on_rank() -> str:
    """Return `` on rank 3`` with a space in front; empty where there is only one process."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return ""
    return f" on rank {dist.get_rank()}"
