"""The LM head, which turns the final residual stream into logits: final norm and unembedding, as sidecar files.

A lens decodes with these files alone, without the model; `residua.analysis.lens.lm_head` reads them. So they have to
give the logits of the model: `lm_head_problem` runs the model over a few tokens and compares.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.activations import ACT2FN

from residua.capture.hooks.forward_call import trial
from residua.capture.identity.few_tokens import FewTokens, logits_of, refuse_without_memory, run_few_tokens
from residua.capture.identity.head_search import FoundHead, find_head, normed
from residua.capture.layout.parameters import FullParameters
from residua.capture.layout.process_layout import spans_processes
from residua.capture.runtime.collectives import all_gather_objects, on_rank
from residua.capture.runtime.pipeline_schedule import stage_model_of
from residua.capture.runtime.process_groups import pipeline_group, tensor_parallel_group
from residua.capture.runtime.sharded import frees_gathered, is_sharded
from residua.capture.runtime.wrappers import core_of, layer_inside, named_modules
from residua.capture.sites.anatomy import Anatomy
from residua.capture.sites.architectures import Family
from residua.capture.sites.pipeline_stages import target_of
from residua.capture.sites.reference_model import unsharded_anatomy
from residua.capture.sites.stacks import anatomies_in_stacks
from residua.capture.taps.tap import tap
from residua.store.base.errors import CaptureError, PlanError
from residua.store.encoding.safetensors_file import safetensors_file
from residua.store.format.sidecars import CONFIG_FILE, LM_HEAD_FILE, PARAMETERS_FILE, Activation, LMHeadSpec
from residua.store.storage.crc import Buffer


def lm_head_files(model: nn.Module) -> dict[str, list[Buffer]]:
    """Return the files of the LM head by name, each as a list of buffers.

    Parameters on the CPU are not copied, except those of FSDP. There are no files for a model whose head is not known.
    Of an architecture that is not in the table, it is searched for by a run over a few tokens, unless it was
    (`residua.capture.identity.head_search`). Whether the files give the model's logits, `lm_head_problem` says. A
    collective of all who hold the model.
    """
    stages = pipeline_group(model)
    if stages is None:
        return _files(model)
    last = dist.get_world_size(stages) - 1
    found = [_files(model) if dist.get_rank(stages) == last else {}]
    dist.broadcast_object_list(found, group=stages, group_src=last)
    return found[0]


def lm_head_of(model: nn.Module) -> tuple[LMHeadSpec, dict[str, Tensor]]:
    """Return what the files of the LM head say: how it is applied, and its parameters by name, on the CPU.

    The model runs over a few tokens, to prove it. A collective of all processes that hold the model.

    Raises:
        PlanError: The head is not known, or not in this process.
        CaptureError: There is no memory to run the model.
    """
    anatomy, problem = _anatomy(model), lm_head_problem(model)
    head = problem or (None if anatomy is None else _known_head(model, anatomy))
    if anatomy is None or not isinstance(head, _Head):
        raise PlanError(f"the LM head of {type(core_of(model)).__name__} is not known: {head}")
    if pipeline_group(model) is not None:
        raise PlanError("the model is a pipeline of several processes, and the LM head is in the last of them only")
    return head.spec, _tensors(model, anatomy, head.modules)


def lm_head_problem(model: nn.Module, few: FewTokens | None = None) -> str:
    """Return why `lm_head_files` would not give the model's logits; empty if they do, on a few tokens.

    The model runs once, unless it did. A collective of all processes that hold it; every one of them gets the same.

    Args:
        model: The model.
        few: Its run over a few tokens, if there was one.

    Raises:
        CaptureError: There is no memory to run the model.
    """
    anatomy = _anatomy(model)
    if anatomy is None:
        return "the model is no language model of one stack of blocks, nor an encoder-decoder"
    stages, ranks = pipeline_group(model), tensor_parallel_group(model, None)
    is_last = stages is None or dist.get_rank(stages) == dist.get_world_size(stages) - 1
    head = _head(model, anatomy) if is_last else ""
    problem = head if isinstance(head, str) else ""
    if not any(all_gather_objects(stages, problem)):
        problem = _proved(model, anatomy, None if isinstance(head, str) else head, few)
    of_ranks = [found for stage in all_gather_objects(stages, all_gather_objects(ranks, problem)) for found in stage]
    return next(filter(None, of_ranks), "")


@dataclass(frozen=True, kw_only=True)
class _Head:
    """An LM head that is known and not yet proved.

    Attributes:
        spec: The content of ``head.json``.
        modules: The modules whose parameters are stored, by the name that they have in the files.
        seen: The final residual stream and the logits of a run that showed it; empty for one of the table.
    """

    spec: LMHeadSpec
    modules: Mapping[str, nn.Module]
    seen: Mapping[str, Tensor] = field(default_factory=dict)


_searched: WeakKeyDictionary[nn.Module, FoundHead] = WeakKeyDictionary()
"""The heads that were found in models that are not in the table, without what their runs showed."""


def _anatomy(model: nn.Module) -> Anatomy | None:
    """Return the anatomy of a language model, or of the decoder of an encoder-decoder."""
    found = unsharded_anatomy(model)
    if found is not None:
        return found
    decoder = anatomies_in_stacks(model).get("decoder")
    if decoder is None:
        return None
    return replace(decoder, unembedding=decoder.path(decoder.model.get_output_embeddings()))  # type: ignore[no-untyped-call]  # theirs


def _known_head(model: nn.Module, anatomy: Anatomy) -> _Head | str:
    """Return the LM head as the table or the last search has it, else as a search finds it; or why it is not known."""
    found = _searched.get(anatomy.model)
    return _head(model, anatomy) if found is None else _usable(anatomy, found)


def _head(model: nn.Module, anatomy: Anatomy) -> _Head | str:
    """Return the LM head by the table, or as a search finds it now; or why it is not known."""
    name = type(anatomy.model).__name__
    if _unembedding(anatomy) is None:
        return f"{name} has none, or one that cannot be found"
    if anatomy.family is not None:
        if anatomy.family.transform is not None and _activation(anatomy) is None:
            return f"its activation {anatomy.config.hidden_act!r} is not one that the files can name"
        modules = _parts(anatomy, anatomy.family)
        return _packed(modules) or _Head(spec=_described(anatomy, anatomy.family, modules), modules=modules)
    if spans_processes(anatomy.model) or is_sharded(anatomy.model) or stage_model_of(anatomy.model) is not None:
        return (
            f"the final norm of models of type {anatomy.model.config.model_type!r} is not in the table, and is found "
            "only in models that one process holds"
        )
    _searched.pop(anatomy.model, None)
    try:
        found = find_head(model, anatomy)
    except Exception as error:  # noqa: BLE001 - the boundary to the user's model, and the capture itself needs none of this
        refuse_without_memory(error)
        return f"the model cannot be run over a few tokens to find it: {(str(error).splitlines() or [''])[0]}"
    if isinstance(found, str):
        return found
    _searched[anatomy.model] = replace(found, seen={})
    return _usable(anatomy, found)


def _usable(anatomy: Anatomy, found: FoundHead) -> _Head | str:
    modules = {name: anatomy.modules[path] for name, path in found.paths.items()}
    return _packed(modules) or _Head(spec=found.spec, modules=modules, seen=found.seen)


def _packed(modules: Mapping[str, nn.Module]) -> str:
    """Return which module of an LM head has weights that cannot be stored as they are; empty if none has."""
    for part, module in modules.items():
        if layer_inside(module) is not module:
            return f"its {part} has an adapter"
        weight = dict(module.named_parameters(recurse=False)).get("weight") if part != "norm" else None
        if part != "norm" and (weight is None or not weight.is_floating_point() or _has_more(module)):
            return f"its {part} is a {type(module).__name__}, whose weights are packed"
    return ""


def _has_more(module: nn.Module) -> bool:
    return hasattr(module.weight, "__tensor_flatten__") and not isinstance(module.weight, DTensor)


def _proved(model: nn.Module, anatomy: Anatomy, head: _Head | None, few: FewTokens | None) -> str:
    """Run the model over a few tokens; return how its logits differ from those of the files, empty if they do not.

    `head` is None in all stages of a pipeline but the last, which run along.
    """
    seen = dict(head.seen) if head is not None and head.seen else {} if few is None else few.seen
    try:
        if len(seen) < _N_SEEN:
            with trial(model):
                _see(model, anatomy, seen)
    except Exception as error:  # noqa: BLE001 - the boundary to the user's model, and the capture itself needs none of this
        refuse_without_memory(error)
        return f"the model cannot be run over a few tokens to prove it: {(str(error).splitlines() or [''])[0]}"
    if head is None:
        return ""
    spec, tensors = head.spec, _tensors(model, anatomy, head.modules)
    if len(seen) < _N_SEEN:  # another rank has them
        return ""
    n_logits = len(tensors["unembed.weight"])
    if seen["logits"].shape[-1] != n_logits:
        return f"the model gives {seen['logits'].shape[-1]} logits, and its unembedding {n_logits}"
    return _compared(spec, tensors, seen, anatomy.model.dtype)


def _compared(spec: LMHeadSpec, tensors: Mapping[str, Tensor], seen: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    """Return how the logits of a model of this type differ from those of the files; empty if they do not."""
    wide = torch.float64 if seen["logits"].dtype == torch.float64 else torch.float32
    n_logits = len(tensors["unembed.weight"])
    columns = torch.linspace(0, n_logits - 1, min(_MOST_COLUMNS, n_logits), dtype=torch.float64).round().long()
    chosen = {
        name: (tensor[columns] if name.startswith("unembed") else tensor).to(wide) for name, tensor in tensors.items()
    }
    try:
        found = _decoded(spec, chosen, seen["final"].cpu().to(wide))
    except (RuntimeError, KeyError) as error:
        return f"its parameters do not fit together: {error}"
    logits = seen["logits"].cpu()[..., columns].to(wide)
    error_of_largest = float((found - logits).abs().max() / logits.abs().max().clamp_min(1e-30))
    if error_of_largest <= _TOLERANCE.get(dtype, _LOW_PRECISION_TOLERANCE):
        return ""
    return (
        f"final norm and unembedding do not give the model's logits: on a few tokens they differ by "
        f"{error_of_largest:.1e} of the largest"
    )


def _see(model: nn.Module, anatomy: Anatomy, seen: dict[str, Tensor]) -> None:
    """Run the model over a few tokens, and put its final residual stream and its logits into `seen`."""
    stage_model = stage_model_of(anatomy.model)
    if stage_model is None:
        with tap(model, "final, logits", seen.__setitem__):
            run_few_tokens(model)
        return
    last = target_of(model).modules.get(anatomy.blocks[-1]) if stage_model.is_last else None
    if last is None:
        run_few_tokens(model)
        return

    def keep(_module: nn.Module, _args: object, output: Any) -> None:
        seen["final"] = output if isinstance(output, Tensor) else output[0]

    handle = last.register_forward_hook(keep)
    try:
        logits = logits_of(run_few_tokens(model))
    finally:
        handle.remove()
    if logits is not None:
        seen["logits"] = logits


def _decoded(spec: LMHeadSpec, parameters: Mapping[str, Tensor], final: Tensor) -> Tensor:
    """Return the logits of the final residual stream, as `residua.store.format.sidecars` says."""
    get = parameters.get
    hidden = normed(spec.norm, final, get("norm.weight"), get("norm.bias"), spec.eps, spec.weight_offset)
    if "project_out.weight" in parameters:
        hidden = F.linear(hidden, parameters["project_out.weight"])
    if spec.activation is not None:
        hidden = F.linear(hidden, parameters["transform.dense.weight"], get("transform.dense.bias"))
        hidden = ACT2FN[spec.activation](hidden)
        norm = get("transform.norm.weight"), get("transform.norm.bias")
        hidden = F.layer_norm(hidden, hidden.shape[-1:], *norm, spec.transform_eps)
    logits = F.linear(hidden, parameters["unembed.weight"], get("unembed.bias")) * spec.logit_scale
    return logits if spec.softcap is None else torch.tanh(logits / spec.softcap) * spec.softcap


def _files(model: nn.Module) -> dict[str, list[Buffer]]:
    anatomy = _anatomy(model)
    head = "" if anatomy is None else _known_head(model, anatomy)
    if anatomy is None or isinstance(head, str):
        return {}
    return {
        PARAMETERS_FILE: safetensors_file(
            {name: array_of(tensor) for name, tensor in _tensors(model, anatomy, head.modules).items()}
        ),
        CONFIG_FILE: [anatomy.model.config.to_json_string().encode()],
        LM_HEAD_FILE: [head.spec.to_json()],
    }


def _tensors(model: nn.Module, anatomy: Anatomy, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the full parameters of the LM head by name; a collective of all who hold this stage of the model."""
    parameters, copied = FullParameters(model), frees_gathered(model)
    paths = {id(module): path for path, module in named_modules(anatomy.model).items()}
    return {
        f"{name}.{kind}": _full(parameters, f"{paths.get(id(module), name)}.{kind}", tensor, copied=copied)
        for name, module in modules.items()
        for kind, tensor in module.named_parameters(recurse=False)
        if kind in ("weight", "bias")
    }


def _full(parameters: FullParameters, name: str, tensor: Tensor, *, copied: bool) -> Tensor:
    found = parameters.full(name, tensor)
    if found is None:
        raise CaptureError(
            f"{name}{on_rank()} is split over the ranks of tensor_parallel in an unknown way, and the archive keeps it "
            "for lenses: pass head=False to capture without it"
        )
    return found.to("cpu", copy=copied).contiguous()


def _unembedding(anatomy: Anatomy) -> nn.Module | None:
    return None if anatomy.unembedding is None else anatomy.modules.get(anatomy.unembedding)


def _parts(anatomy: Anatomy, family: Family) -> dict[str, nn.Module]:
    """Return the modules whose parameters are stored, by the name that they have in the files."""
    transform = _submodule(anatomy.model, family.transform)
    modules = {
        "norm": _submodule(anatomy.model.base_model, family.final_norm),
        "project_out": _submodule(anatomy.model.base_model, family.project_out),
        "transform.dense": _submodule(transform, "dense"),
        "transform.norm": _submodule(transform, "LayerNorm"),
        "unembed": _unembedding(anatomy),
    }
    return {name: module for name, module in modules.items() if module is not None}


def _described(anatomy: Anatomy, family: Family, modules: Mapping[str, nn.Module]) -> LMHeadSpec:
    """Return the content of ``head.json``, given the modules whose parameters are stored."""
    norm = modules.get("norm")
    return LMHeadSpec(
        norm="none" if norm is None else "layer" if isinstance(norm, nn.LayerNorm) else "rms",
        eps=_eps(norm),
        weight_offset=family.norm_offset,
        activation=None if _submodule(anatomy.model, family.transform) is None else _activation(anatomy),
        transform_eps=_eps(modules.get("transform.norm")),
        softcap=getattr(anatomy.config, "final_logit_softcapping", None),
        dtype=anatomy.dtype,
    )


_SAME_ACTIVATIONS: Mapping[str, Activation] = {
    "gelu_python": "gelu",
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
    "swish": "silu",
}


def _activation(anatomy: Anatomy) -> Activation | None:
    """Return the name that the files have for the model's activation; None if they have none."""
    name = anatomy.config.hidden_act
    known: dict[str, Activation] = {one: one for one in get_args(Activation)} | dict(_SAME_ACTIVATIONS)
    return known.get(name) if isinstance(name, str) else None


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


def array_of(tensor: Tensor) -> npt.NDArray[Any]:
    """Return the memory of a contiguous tensor on the CPU as an array of its shape and data type."""
    dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))  # of `ml_dtypes` where numpy has none
    found: npt.NDArray[Any] = tensor.reshape(-1).view(torch.uint8).numpy().view(dtype).reshape(tensor.shape)
    return found


_N_SEEN = 2  # final residual stream and logits
_MOST_COLUMNS = 4096  # logits that are compared, evenly spaced
# The largest error of a logit, as a part of the largest logit: a model may round in another order than we do.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_LOW_PRECISION_TOLERANCE = 0.05
