"""One affine map from a point of the residual stream to the final one, and the files that hold such maps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from residua.store.base.errors import AnalysisError
from residua.store.storage.files import write_file


class Translator(NamedTuple):
    """From a residual stream to an estimate of the final one: ``hidden @ weight + bias``.

    Attributes:
        weight: (width, width), float32.
        bias: (width,), float32.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def identity(cls, width: int) -> Self:
        """Return the map that changes nothing, which is the logit lens."""
        return cls(torch.eye(width), torch.zeros(width))

    @classmethod
    def mean(cls, parts: Sequence[Self]) -> Self:
        """Return the average of maps, summed in their order in float64."""
        weight = torch.stack([part.weight.double() for part in parts]).mean(0)
        return cls(weight.float(), torch.stack([part.bias.double() for part in parts]).mean(0).float())

    def copy(self) -> Self:
        """Return a copy in memory of a map that may lie in a file."""
        return type(self)(self.weight.clone(), self.bias.clone())

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """Map (rows, width), float32."""
        return torch.addmm(self.bias, hidden_ND, self.weight)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file, durably and whole or not at all."""
    write_file(path, [save({name: tensor.contiguous() for name, tensor in tensors.items()})])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read what `write_tensors` wrote; the values stay on the disk until they are needed.

    Raises:
        AnalysisError: The file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise AnalysisError(f"{path} cannot be read ({error}): remove it, and train the lens again") from error


def write_translators(path: Path, translators: Mapping[str, Translator], *, penalty: float) -> None:
    """Write maps by name as one file, with the penalty of the ridge."""
    pairs = {name: translator._asdict() for name, translator in translators.items()}
    tensors = {f"{name}.{part}": tensor for name, both in pairs.items() for part, tensor in both.items()}
    write_tensors(path, {**tensors, "penalty": torch.tensor(penalty, dtype=torch.float64)})


def read_translators(path: Path) -> dict[str, Translator]:
    """Read what `write_translators` wrote.

    Raises:
        AnalysisError: The file is missing or damaged.
    """
    tensors = read_tensors(path)
    names = dict.fromkeys(name.removesuffix(".weight") for name in tensors if name.endswith(".weight"))
    return {name: Translator(tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in names}
