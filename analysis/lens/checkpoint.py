"""The affine maps of a lens, and the files that hold them.

A finished lens is a folder in the format of the `tuned-lens` package (0.2.0), written and read without that package:
``config.json`` holds the keys of its `TunedLensConfig`; `residua.store.edits.lens_files` describes ``params.pt`` and
reads it safely. While a lens is being trained, its maps lie in safetensors files.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from residua.analysis.lens.rows import MOST_BLOCKS
from residua.store.base.errors import AnalysisError, PlanError
from residua.store.edits.lens_files import (
    CONFIG_FILE,
    PARAMETERS_FILE,
    is_stored_tensor,
    read_parameters,
    read_trained_layers,
)
from residua.store.encoding.safetensors_file import safetensors_file
from residua.store.storage.files import make_folders, write_file

LENS_TYPE = "linear_tuned_lens"
_MOST_CONFIG_BYTES = 2**20
_MOST_WIDTH = 2**20
_WIDEST_ITEM = 8  # bytes of a float64
_MOST_PICKLE_BYTES = 2**24
_ADVICE = "choose a folder that `residua lens train` or the tuned-lens package wrote"


class Translator(NamedTuple):
    """An affine map from a residual stream to an estimate of the final one: ``hidden @ weight + bias``.

    Attributes:
        weight: (width, width), float32.
        bias: (width,), float32.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def identity(cls, width: int) -> Self:
        """Return the identity, which makes the logit lens."""
        return cls(torch.eye(width), torch.zeros(width))

    @classmethod
    def mean(cls, translators: Sequence[Self]) -> Self:
        """Return the average, summed in order in float64; of one, the one itself."""
        first, *others = translators
        if not others:
            return first
        total = [tensor.double() for tensor in first]
        for other in others:
            for summed, tensor in zip(total, other, strict=True):
                summed.add_(tensor)  # in place: at width 8,192 each copy is 0.5 GiB
        return cls(*(summed.div_(len(translators)).float() for summed in total))

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """Map (rows, width), float32."""
        return torch.addmm(self.bias, hidden_ND, self.weight)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file, durably and atomically."""
    write_file(path, safetensors_file({name: tensor.contiguous().numpy() for name, tensor in tensors.items()}))


def read_tensors(path: Path, *, is_mapped: bool = True) -> dict[str, Tensor]:
    """Read a file of `write_tensors`.

    Args:
        path: The file.
        is_mapped: Map the file. The memory of a tensor that is changed then stays until all of them are gone; if false,
            it goes with the tensor.

    Raises:
        AnalysisError: The file is missing or damaged.
    """
    try:
        if is_mapped:
            return load_file(path)
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        return {name: _read_tensor(path, name) for name in names}
    except (OSError, SafetensorError) as error:
        raise AnalysisError(f"{path} cannot be read ({error}): remove it, and train the lens again") from error


def _read_tensor(path: Path, name: str) -> Tensor:
    """Return a copy of one tensor, without the pages of the others."""
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor.clone()


def write_translators(path: Path, translators: Mapping[str, Translator], *, penalty: float) -> None:
    """Write named maps of one layer as one file, with the penalty of the ridge regression."""
    tensors = {f"{name}.weight": translator.weight for name, translator in translators.items()}
    tensors |= {f"{name}.bias": translator.bias for name, translator in translators.items()}
    write_tensors(path, {**tensors, "penalty": torch.tensor(penalty, dtype=torch.float64)})


def read_translators(path: Path) -> tuple[dict[str, Translator], float]:
    """Read a file of `write_translators`; returns its maps by name, and the penalty.

    Raises:
        AnalysisError: The file is missing or damaged.
    """
    tensors = read_tensors(path)
    names = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    translators = {name: Translator(tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in names}
    return translators, tensors["penalty"].item()


@dataclass(frozen=True, kw_only=True)
class LensConfig:
    """The content of ``config.json``, with the package's own names.

    Attributes:
        base_model_name_or_path: The model.
        d_model: Width of its residual stream.
        num_hidden_layers: Number of its blocks, and so of translators.
        bias: Whether translators have a bias.
        base_model_revision: Revision of the model.
        unembed_hash: Result of `hash_unembedding` for its unembedding.
        lens_type: Always ``linear_tuned_lens``.
    """

    base_model_name_or_path: str
    d_model: int
    num_hidden_layers: int
    bias: bool = True
    base_model_revision: str | None = None
    unembed_hash: str | None = None
    lens_type: str = LENS_TYPE


def hash_unembedding(weight: Tensor) -> str:
    """Return the package's hash of an unembedding, (vocabulary, width): the SHA-256 of its numpy text.

    The text has one decimal place and leaves out most numbers, so close or partly equal matrices can share a hash.
    """
    with np.printoptions(threshold=1000, edgeitems=3, linewidth=75, floatmode="maxprec", sign="-"):
        text = np.array_str(weight.detach().float().cpu().numpy(), precision=1)
    return hashlib.sha256(text.encode()).hexdigest()


def write_checkpoint(folder: Path, config: LensConfig, translators: Mapping[int, Translator]) -> None:
    """Write a lens. A layer without a translator gets a zero map, which makes the logit lens there."""
    identity = torch.eye(config.d_model)
    zero = Translator(torch.zeros_like(identity), torch.zeros(config.d_model))  # torch writes a shared storage once
    state: dict[str, Tensor] = {}
    for layer in range(config.num_hidden_layers):
        known = translators.get(layer)
        weight, bias = zero if known is None else ((known.weight - identity).T.contiguous(), known.bias)
        state |= {f"{layer}.weight": weight, f"{layer}.bias": bias}
    make_folders(folder)
    with TemporaryFile(dir=folder) as file:
        torch.save(state, file)
        file.flush()
        write_file(folder / PARAMETERS_FILE, [np.memmap(file, np.uint8, "r")])
    write_file(folder / CONFIG_FILE, [json.dumps(asdict(config)).encode()])


def read_checkpoint(folder: Path) -> tuple[LensConfig, dict[int, Translator]]:
    """Read a lens that `write_checkpoint` or the package wrote.

    Returns:
        The config, and the translators of the trained layers; of all layers if ``residua.json`` does not list them.
        Translators whose stored map is zero share one identity.

    Raises:
        AnalysisError: A file is missing, or does not hold a lens.
    """
    config = _read_config(folder / CONFIG_FILE)
    width, n_layers, path = config.d_model, config.num_hidden_layers, folder / PARAMETERS_FILE
    try:
        trained = read_trained_layers(folder)
        state = read_parameters(path, most_bytes=_MOST_PICKLE_BYTES + n_layers * (width + 1) * width * _WIDEST_ITEM)
    except PlanError as error:
        sizes = f"{CONFIG_FILE} describes a lens of {n_layers} blocks of width {width}"
        raise AnalysisError(f"{error}; {sizes}: {_ADVICE}") from error.__cause__
    maps = _checked_maps(path, config, state)
    identity = Translator.identity(width)
    translators: dict[int, Translator] = {}
    storages: set[int] = set()
    for layer, (weight, bias) in maps.items():
        if not weight.any() and not bias.any():
            translators[layer] = identity
            continue
        storages.add(weight.untyped_storage().data_ptr())
        translators[layer] = Translator(weight.float().T + identity.weight, bias.float().clone())
        if len(storages) < sum(known is not identity for known in translators.values()):
            raise AnalysisError(f"{path} holds one matrix under several names, {layer}.weight among them: {_ADVICE}")
    return config, {layer: known for layer, known in translators.items() if trained is None or layer in trained}


def _read_config(path: Path) -> LensConfig:
    try:
        found = json.loads(path.read_bytes() if path.stat().st_size <= _MOST_CONFIG_BYTES else b"")
        known = {field.name for field in fields(LensConfig)}
        config = LensConfig(**{name: value for name, value in found.items() if name in known})
    except FileNotFoundError as error:
        raise AnalysisError(f"{path.parent} is not a lens, it has no {path.name}: {_ADVICE}") from error
    except (OSError, ValueError, RecursionError, TypeError, AttributeError) as error:
        raise AnalysisError(f"{path} is not the config of a lens ({error}): {_ADVICE}") from error
    sizes = (config.d_model, config.num_hidden_layers)
    bounds = zip(sizes, (_MOST_WIDTH, MOST_BLOCKS), strict=True)
    if config.lens_type != LENS_TYPE or not all(type(size) is int and 0 < size <= most for size, most in bounds):
        raise AnalysisError(
            f"{path} describes a lens of type {str(config.lens_type)[:40]!r} and sizes {str(sizes)[:80]}: {_ADVICE}"
        )
    return config


def _checked_maps(path: Path, config: LensConfig, state: Mapping[str, object]) -> dict[int, tuple[Tensor, Tensor]]:
    """Return the stored weight and bias of each layer, after a check that there is nothing else."""
    width, layers = config.d_model, range(config.num_hidden_layers)
    expected: dict[str, tuple[int, ...]] = {f"{layer}.weight": (width, width) for layer in layers}
    if config.bias:
        expected |= {f"{layer}.bias": (width,) for layer in layers}
    tensors = {name: value for name, value in state.items() if is_stored_tensor(value)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected or len(state) != len(expected):
        wrong = sorted(set(map(str, found.items())) ^ set(map(str, expected.items())))
        raise AnalysisError(
            f"{path} holds other tensors than a lens of {len(layers)} blocks of width {width} has: "
            f"{', '.join(wrong)[:200]}: {_ADVICE}"
        )
    no_bias = torch.zeros(width)
    return {layer: (tensors[f"{layer}.weight"], tensors.get(f"{layer}.bias", no_bias)) for layer in layers}
