"""The stored LM head of a model: from the final residual stream to logits, without the model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from safetensors import SafetensorError, safe_open
from torch import Tensor

from residua.store.base.errors import AnalysisError, DamagedArchiveError, UnsafeArchiveError
from residua.store.base.untrusted import check_file
from residua.store.format.archive_metadata import (
    SIDECAR_FOLDERS,
    file_digest,
    is_archive,
    read_metadata,
    require_digest,
)
from residua.store.format.sidecars import LM_HEAD_FILE, PARAMETERS_FILE, Activation, LMHeadSpec, why_no_lm_head

_MAX_SPEC_BYTES = 2**20

_ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class LMHead:
    """A model's final norm and unembedding.

    Attributes:
        spec: How they are applied.
        parameters: Their parameters, by the names of `residua.store.format.sidecars`.
    """

    spec: LMHeadSpec
    parameters: Mapping[str, Tensor]

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        inner = self.parameters.get("project_out.weight", self.parameters["unembed.weight"])
        return int(inner.shape[1])

    @property
    def vocabulary_size(self) -> int:
        """Number of logits."""
        return int(self.parameters["unembed.weight"].shape[0])

    def hidden(self, final: Tensor) -> Tensor:
        """Return the input of the unembedding, (..., inner width); arguments as for `logits`."""
        hidden = self._norm(final)
        if "project_out.weight" in self.parameters:
            hidden = F.linear(hidden, self.parameters["project_out.weight"])
        if self.spec.activation is not None:
            hidden = self._transformed(hidden, self.spec.activation)
        return hidden

    def logits(self, final: Tensor) -> Tensor:
        """Decode the final residual stream, with the same rounding as the model.

        Args:
            final: Output of the last block, (..., width), in the type and on the device of the parameters.

        Returns:
            (..., vocabulary), of the same type.
        """
        hidden = self.hidden(final)
        unembed = self.parameters["unembed.weight"]
        logits = F.linear(hidden, unembed, self.parameters.get("unembed.bias")) * self.spec.logit_scale
        if self.spec.softcap is None:
            return logits
        return torch.tanh(logits / self.spec.softcap) * self.spec.softcap

    def _norm(self, final: Tensor) -> Tensor:
        weight, bias = self.parameters.get("norm.weight"), self.parameters.get("norm.bias")
        if self.spec.norm == "none":
            return final
        if self.spec.norm == "layer":
            return F.layer_norm(final, final.shape[-1:], weight, bias, self.spec.eps)
        wide = final if final.dtype == torch.float64 else final.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.spec.eps)
        if weight is None:
            return scaled.to(final.dtype)
        if self.spec.weight_offset:  # Gemma multiplies before it rounds, Llama after
            return (scaled * (self.spec.weight_offset + weight.to(wide.dtype))).to(final.dtype)
        return weight * scaled.to(final.dtype)

    def _transformed(self, hidden: Tensor, activation: Activation) -> Tensor:
        get = self.parameters.get
        dense = F.linear(hidden, self.parameters["transform.dense.weight"], get("transform.dense.bias"))
        active = _ACTIVATIONS[activation](dense)
        weight, bias = get("transform.norm.weight"), get("transform.norm.bias")
        return F.layer_norm(active, active.shape[-1:], weight, bias, self.spec.transform_eps)


def load_lm_head(folder: Path, *, dtype: torch.dtype | None = None) -> LMHead:
    """Read an LM head, after a check of file sizes, digests and shapes.

    Args:
        folder: The ``head`` folder of an archive or of a lens.
        dtype: Type to cast the parameters to; None keeps the model's.

    Raises:
        AnalysisError: The archive has no LM head; the message says why.
        DamagedArchiveError: A file is missing, cut short, or differs from the one that the archive was made with.
        UnsafeArchiveError: The files do not describe an LM head.
    """
    metadata = read_metadata(folder.parent) if is_archive(folder.parent) else None
    digests = {} if metadata is None else metadata.files
    if metadata is not None and f"{folder.name}/{LM_HEAD_FILE}" not in digests:
        raise AnalysisError(f"{folder.parent}: {why_no_lm_head(metadata.provenance)}")
    try:
        spec = LMHeadSpec.from_json(_checked(folder, LM_HEAD_FILE, _MAX_SPEC_BYTES, digests).read_bytes())
        parameters = _checked(folder, PARAMETERS_FILE, SIDECAR_FOLDERS["head"], digests)
        with safe_open(parameters, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no dict
            shapes = {name: tuple(one.get_shape()) for name, one in slices.items()}
            _check_shapes(spec, shapes, folder)
            _check_types({name: one.get_dtype() for name, one in slices.items()}, folder)
            stored = {name: file.get_tensor(name).to(dtype=dtype) for name in shapes}
    except (OSError, SafetensorError) as error:
        raise DamagedArchiveError(
            f"the LM head in {folder} cannot be read: {error}. Copy the folder again, or capture again"
        ) from error
    return LMHead(spec, stored)


def _checked(folder: Path, name: str, most_bytes: int, digests: Mapping[str, str]) -> Path:
    """Return the path of a file of the LM head, after a check of its size and of its digest, if the archive has one."""
    path = folder / name
    check_file(folder.parent, path, most_bytes)
    expected = digests.get(f"{folder.name}/{name}")
    if expected is not None:
        require_digest(path, file_digest(path), expected)
    return path


def _check_types(types: Mapping[str, str], folder: Path) -> None:
    """Raise UnsafeArchiveError if a parameter is not of floating-point numbers, which no LM head of ours has."""
    wrong = {name: kind for name, kind in types.items() if not kind.startswith(("F", "BF"))}
    if wrong:
        raise UnsafeArchiveError(
            f"{folder / PARAMETERS_FILE} holds {wrong}, and the parameters of an LM head are floating-point numbers: "
            "copy the archive again from its source"
        )


def _check_shapes(spec: LMHeadSpec, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Raise UnsafeArchiveError if the parameters do not fit together."""
    n_logits, inner = shapes["unembed.weight"] if len(shapes.get("unembed.weight", ())) == 2 else (0, 0)
    width = shapes["project_out.weight"][-1] if "project_out.weight" in shapes else inner
    expected = {
        "norm.weight": (width,),
        "norm.bias": (width,),
        "project_out.weight": (inner, width),
        "transform.dense.weight": (inner, inner),
        "transform.dense.bias": (inner,),
        "transform.norm.weight": (inner,),
        "transform.norm.bias": (inner,),
        "unembed.weight": (n_logits, inner),
        "unembed.bias": (n_logits,),
    }
    needed = {"unembed.weight"} | ({"transform.dense.weight"} if spec.activation else set())
    wrong = {name: shape for name, shape in shapes.items() if expected.get(name) != shape}
    if wrong or not inner or needed - shapes.keys():
        raise UnsafeArchiveError(
            f"{folder / PARAMETERS_FILE} holds {shapes}, which is not an LM head: it needs {sorted(needed)}, and all "
            "shapes must fit together. Copy the archive again from its source"
        )
