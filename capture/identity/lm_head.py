"""The LM head, which turns the final residual stream into logits: final norm and unembedding, as sidecar files.

A lens decodes with these files alone, without the model; `residua.analysis.lens.lm_head` reads them.
"""

import json
import struct
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from residua.capture.layout.parameters import FullParameters
from residua.capture.runtime.collectives import on_rank
from residua.capture.runtime.process_groups import pipeline_group
from residua.capture.runtime.wrappers import named_modules
from residua.capture.sites.anatomy import Anatomy
from residua.capture.sites.architectures import Family
from residua.capture.sites.reference_model import unsharded_anatomy
from residua.store.base.errors import CaptureError
from residua.store.format.sidecars import CONFIG_FILE, LM_HEAD_FILE, PARAMETERS_FILE, LMHeadSpec
from residua.store.storage.crc import Buffer


def lm_head_files(model: nn.Module) -> dict[str, list[Buffer]]:
    """Return the files of the LM head by name, each as a list of buffers; parameters on the CPU are not copied.

    There are none for a model whose head is not known for certain: one without an LM head, or of an architecture that
    is not in the table. A collective of all processes that hold the model.
    """
    stages = pipeline_group(model)
    if stages is None:
        return _files(model)
    last = dist.get_world_size(stages) - 1
    found = [_files(model) if dist.get_rank(stages) == last else {}]
    dist.broadcast_object_list(found, group=stages, group_src=last)
    return found[0]


def _files(model: nn.Module) -> dict[str, list[Buffer]]:
    anatomy = unsharded_anatomy(model)
    if anatomy is None or anatomy.family is None or _unembedding(anatomy) is None:
        return {}
    spec, modules = _described(anatomy, anatomy.family)
    parameters = FullParameters(model)
    paths = {id(module): path for path, module in named_modules(anatomy.model).items()}
    tensors = {
        f"{name}.{kind}": _full(parameters, f"{paths.get(id(module), name)}.{kind}", tensor)
        for name, module in modules.items()
        for kind, tensor in module.named_parameters(recurse=False)
        if kind in ("weight", "bias")
    }
    return {
        PARAMETERS_FILE: safetensors_file(tensors),
        CONFIG_FILE: [anatomy.model.config.to_json_string().encode()],
        LM_HEAD_FILE: [spec.to_json()],
    }


def _full(parameters: FullParameters, name: str, tensor: Tensor) -> Tensor:
    found = parameters.full(name, tensor)
    if found is None:
        raise CaptureError(
            f"{name}{on_rank()} is split over the ranks of tensor_parallel in an unknown way, and the archive keeps it "
            "for lenses: pass head=False to capture without it"
        )
    return found.cpu().contiguous()


def _unembedding(anatomy: Anatomy) -> nn.Module | None:
    return None if anatomy.unembedding is None else anatomy.modules.get(anatomy.unembedding)


def _described(anatomy: Anatomy, family: Family) -> tuple[LMHeadSpec, dict[str, nn.Module]]:
    """Return the content of ``head.json``, and the modules whose parameters are stored."""
    norm = _submodule(anatomy.model.base_model, family.final_norm)
    transform = _submodule(anatomy.model, family.transform)
    modules = {
        "norm": norm,
        "project_out": _submodule(anatomy.model.base_model, family.project_out),
        "transform.dense": _submodule(transform, "dense"),
        "transform.norm": _submodule(transform, "LayerNorm"),
        "unembed": _unembedding(anatomy),
    }
    spec = LMHeadSpec(
        norm="none" if norm is None else "layer" if isinstance(norm, nn.LayerNorm) else "rms",
        eps=_eps(norm),
        weight_offset=family.norm_offset,
        activation=None if transform is None else anatomy.config.hidden_act,
        transform_eps=_eps(modules["transform.norm"]),
        softcap=getattr(anatomy.config, "final_logit_softcapping", None),
        dtype=anatomy.dtype,
    )
    return spec, {name: module for name, module in modules.items() if module is not None}


def _submodule(module: nn.Module | None, path: str | None) -> nn.Module | None:
    """Return the module at a path below another; None where either is missing (OPT sets missing modules to None)."""
    if module is None or path is None:
        return None
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _eps(norm: nn.Module | None) -> float:
    """Return the epsilon of a norm; Llama's norms call it variance_epsilon."""
    if norm is None:
        return 0.0
    eps = getattr(norm, "eps", None)
    return float(getattr(norm, "variance_epsilon") if eps is None else eps)  # noqa: B009 - typed as a module


_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_ALIGNMENT = 8


def safetensors_file(tensors: Mapping[str, Tensor]) -> list[Buffer]:
    """Return a safetensors file as buffers: a header, and the memory of each tensor in the order given.

    The format: https://github.com/huggingface/safetensors#format. The library's own writer sorts the tensors, and its
    `serialize` copies them; these buffers can also be sent to another process.

    Args:
        tensors: On the CPU, contiguous. They are not copied: do not change them before the buffers are written.

    Raises:
        KeyError: A tensor has a dtype that no parameter of an LM head has.
    """
    header: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return [struct.pack("<Q", len(text)), text, *(t.reshape(-1).view(torch.uint8).numpy() for t in tensors.values())]
