"""What turns the final residual stream into logits: final norm and unembedding, as files beside the archive.

A lens decodes with these alone, without the model; `residua.analysis.lens.lm_head` reads them.
"""

import torch.distributed as dist
from torch import Tensor, nn

from residua.capture.identity.parameter_file import parameter_file
from residua.capture.layout.weights_by_hand import Weights
from residua.capture.runtime.collectives import on_rank
from residua.capture.runtime.process_groups import pipeline_group
from residua.capture.runtime.wrappers import named_parts
from residua.capture.sites.anatomy import Anatomy
from residua.capture.sites.architectures import Family
from residua.capture.sites.reference_model import whole_anatomy
from residua.store.base.errors import CaptureError
from residua.store.format.headspec import CONFIG_FILE, HEAD_FILE, PARAMETERS_FILE, HeadSpec
from residua.store.storage.crc import Buffer


def head_files(model: nn.Module) -> dict[str, list[Buffer]]:
    """Return the files of a head, by name, each in parts; parameters on the CPU are not copied.

    There are none for a model whose head is not known for certain, that is one without a language modelling head or
    of an architecture that is not in the table. Of a model that is spread over several processes this is a collective
    of them all.
    """
    stages = pipeline_group(model)
    if stages is None:
        return _files(model)
    last = dist.get_world_size(stages) - 1
    found = [_files(model) if dist.get_rank(stages) == last else {}]
    dist.broadcast_object_list(found, src=dist.get_global_rank(stages, last), group=stages)
    return found[0]


def _files(model: nn.Module) -> dict[str, list[Buffer]]:
    anatomy = whole_anatomy(model)
    if anatomy is None or anatomy.family is None or _unembedding(anatomy) is None:
        return {}
    spec, modules = _described(anatomy, anatomy.family)
    weights, paths = Weights(model), {id(module): path for path, module in named_parts(anatomy.model).items()}
    tensors = {
        f"{name}.{kind}": _whole(weights, f"{paths.get(id(module), name)}.{kind}", tensor)
        for name, module in modules.items()
        for kind, tensor in module.named_parameters(recurse=False)
        if kind in ("weight", "bias")
    }
    return {
        PARAMETERS_FILE: parameter_file(tensors),
        CONFIG_FILE: [anatomy.model.config.to_json_string().encode()],
        HEAD_FILE: [spec.to_json()],
    }


def _whole(weights: Weights, name: str, tensor: Tensor) -> Tensor:
    found = weights.whole(name, tensor)
    if found is None:
        raise CaptureError(
            f"{name}{on_rank()} is split over the ranks of tensor_parallel in a way that cannot be told, and the "
            "archive keeps it for lenses: pass head=False to capture without it"
        )
    return found.cpu().contiguous()


def _unembedding(anatomy: Anatomy) -> nn.Module | None:
    return None if anatomy.unembedding is None else anatomy.parts.get(anatomy.unembedding)


def _described(anatomy: Anatomy, family: Family) -> tuple[HeadSpec, dict[str, nn.Module]]:
    """What ``head.json`` says, and the modules whose parameters go beside it."""
    norm = _part(anatomy.model.base_model, family.final_norm)
    transform = _part(anatomy.model, family.transform)
    modules = {
        "norm": norm,
        "project_out": _part(anatomy.model.base_model, family.project_out),
        "transform.dense": _part(transform, "dense"),
        "transform.norm": _part(transform, "LayerNorm"),
        "unembed": _unembedding(anatomy),
    }
    spec = HeadSpec(
        norm="none" if norm is None else "layer" if isinstance(norm, nn.LayerNorm) else "rms",
        eps=_eps(norm),
        weight_offset=family.norm_offset,
        activation=None if transform is None else anatomy.config.hidden_act,
        transform_eps=_eps(modules["transform.norm"]),
        softcap=getattr(anatomy.config, "final_logit_softcapping", None),
        dtype=anatomy.dtype,
    )
    return spec, {name: module for name, module in modules.items() if module is not None}


def _part(module: nn.Module | None, path: str | None) -> nn.Module | None:
    """A module below another; None where either is not there (OPT sets what it lacks to None)."""
    if module is None or path is None:
        return None
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _eps(norm: nn.Module | None) -> float:
    """What a norm adds under its root; Llama's norms call it variance_epsilon."""
    if norm is None:
        return 0.0
    eps = getattr(norm, "eps", None)
    return float(getattr(norm, "variance_epsilon") if eps is None else eps)  # noqa: B009 - typed as a module
