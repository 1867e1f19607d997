"""Where the numbers came from: everything that one needs to capture the same rows again."""

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from residua.store.canonical import Json, digest_of

PACKAGES = ("residua", "torch", "transformers", "accelerate", "tokenizers", "zarr", "numcodecs", "numpy", "pyarrow")


def environment() -> dict[str, Json]:
    """Return the package versions, processor, and thread count that the numbers depend on."""
    return {
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def devices(model: nn.Module) -> list[str]:
    """Return the kinds of device that hold the model's parameters, by name where they have one."""
    found = {parameter.device for parameter in model.parameters()}
    return sorted(torch.cuda.get_device_name(d) if d.type == "cuda" else d.type for d in found)


def config_digest(model: nn.Module) -> str:
    """Return the SHA-256 of the model's config without what depends on the place and the library's version."""
    config = getattr(model, "config", None)
    if config is None:
        return digest_of(type(model).__qualname__)
    values = config.to_dict()
    for key in ("_name_or_path", "transformers_version", "_attn_implementation", "dtype", "torch_dtype", "use_cache"):
        values.pop(key, None)
    return hashlib.sha256(config.__class__(**values).to_json_string(use_diff=True).encode()).hexdigest()


def folder_digest(folder: Path) -> str:
    """Return a SHA-256 over names and contents of the files in `folder`."""
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    return digest_of(files)
