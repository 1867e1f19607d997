"""Routing, latents and mixers of models that two ranks hold, for a test that compares them with one process.

torchrun --nproc-per-node 2 -m tests.distributed.model_parallel.routed_cases FOLDER
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from residua.pipelines.capture.result import CaptureResult
from tests.distributed.model_parallel.capture_cases import capture

SITES = {
    "deepseek_v3": "router_logits.*,expert_index.*,expert_weight.*,routed_out.*,shared_out.*,kv_latent.*,mlp_out.*",
    "jamba": "router_logits.*,routed_out.*,mixer_out.*,attn_out.*,resid_post.*",
}
"""Models that are not in the table of architectures, and the sites of each."""


def captured(model: object, name: str, out: Path) -> CaptureResult:
    return capture(model, out, SITES[name])


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name in SITES:
        model = AutoModelForCausalLM.from_pretrained(
            folder / name, distributed_config=DistributedConfig(tp_size=2), dtype=torch.float32
        )
        nn.Module.train(model, False)
        captured(model, name, folder / f"{name}-tp2.zarr")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
