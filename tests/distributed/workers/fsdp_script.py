"""A user's own script that captures a model under FSDP2, slowly.

    python -m tests.distributed.workers.fsdp_script OUT SECONDS

Each forward pass takes SECONDS longer. The ranks find each other by environment variables, without a launcher.
"""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from tests.distributed.workers.user_script import capture
from tests.models.tiny import TINY


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = TINY["llama"]()
    blocks = list(model.get_submodule("model.layers").children())
    blocks[0].register_forward_hook(lambda *_: time.sleep(float(sys.argv[2])))
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    capture(model, Path(sys.argv[1]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
