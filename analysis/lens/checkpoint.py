"""Lenses in the folder format of the `tuned-lens` package (0.2.0), read and written without it.

``config.json`` holds the keys of its `TunedLensConfig`. ``params.pt`` is the state of its translators, written by
`torch.save`: for every depth before the last, ``{depth}.weight`` and ``{depth}.bias`` of a linear layer whose output is
added to its input. Files are read with `weights_only`, so nothing in them is run.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryFile
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import numpy as np
import torch
from torch import Tensor

from residua.analysis.lens.points import MOST_BLOCKS
from residua.analysis.lens.translator import Translator
from residua.store.base.errors import AnalysisError
from residua.store.storage.files import make_folders, write_file

CONFIG_FILE, PARAMETERS_FILE = "config.json", "params.pt"
LENS_TYPE = "linear_tuned_lens"
_MOST_CONFIG_BYTES = 2**20
_MOST_WIDTH = 2**20
_WIDEST = 8  # bytes of a float64
_MOST_PICKLE_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class LensConfig:
    """What ``config.json`` says; names and meaning are the package's own.

    Attributes:
        base_model_name_or_path: The model.
        d_model: Width of its residual stream.
        num_hidden_layers: Its blocks, and so the translators.
        bias: Whether translators have a bias.
        base_model_revision: Revision of the model.
        unembed_hash: What `hash_unembedding` gives for its unembedding.
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
    """Return the package's hash of an unembedding, (vocabulary, width): of what numpy shows of it.

    It is the same for small perturbations, and says nothing of what numpy leaves out with three dots.
    """
    with np.printoptions(threshold=1000, edgeitems=3, linewidth=75, floatmode="maxprec", sign="-"):
        shown = np.array_str(weight.detach().float().cpu().numpy(), precision=1)
    return hashlib.sha256(shown.encode()).hexdigest()


def write_checkpoint(folder: Path, config: LensConfig, translators: dict[int, Translator]) -> None:
    """Write a lens; a depth without a translator becomes the logit lens, whose translator is zero."""
    identity = torch.eye(config.d_model)
    zero = Translator(torch.zeros_like(identity), torch.zeros(config.d_model))  # torch writes one storage once
    state: dict[str, Tensor] = {}
    for depth in range(config.num_hidden_layers):
        known = translators.get(depth)
        weight, bias = zero if known is None else ((known.weight - identity).T.contiguous(), known.bias)
        state |= {f"{depth}.weight": weight, f"{depth}.bias": bias}
    make_folders(folder)
    with TemporaryFile(dir=folder) as file:
        torch.save(state, file)
        file.flush()
        write_file(folder / PARAMETERS_FILE, [np.memmap(file, np.uint8, "r")])
    write_file(folder / CONFIG_FILE, [json.dumps(asdict(config)).encode()])


def read_checkpoint(folder: Path) -> tuple[LensConfig, dict[int, Translator]]:
    """Read a lens that this module or the package wrote.

    Returns:
        What the config says, and the translators by depth; those that are zero as the identity.

    Raises:
        AnalysisError: A file is missing, or does not hold a lens.
    """
    config = _read_config(folder / CONFIG_FILE)
    path = folder / PARAMETERS_FILE
    _check_zip(path, config)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever a strange pickle makes it stumble over
        raise AnalysisError(f"{path} cannot be read as a checkpoint of tensors ({error}): {_ADVICE}") from error
    _check_state(path, config, state)
    identity = Translator.identity(config.d_model)
    translators: dict[int, Translator] = {}
    storages: set[int] = set()
    for depth in range(config.num_hidden_layers):
        weight = state[f"{depth}.weight"]
        bias = state[f"{depth}.bias"].float() if config.bias else identity.bias
        if not weight.any() and not bias.any():  # such share one map, as they share one storage in the file
            translators[depth] = identity
            continue
        storages.add(weight.untyped_storage().data_ptr())
        translators[depth] = Translator(weight.float().T + identity.weight, bias)
        if len(storages) < sum(known is not identity for known in translators.values()):
            raise AnalysisError(f"{path} holds one matrix under several names, {depth}.weight among them: {_ADVICE}")
    return config, translators


def _read_config(path: Path) -> LensConfig:
    try:
        found = json.loads(path.read_bytes() if path.stat().st_size <= _MOST_CONFIG_BYTES else b"")
    except FileNotFoundError as error:
        raise AnalysisError(f"{path.parent} is no lens, it has no {path.name}: {_ADVICE}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise AnalysisError(f"{path} is not the config of a lens ({error}): {_ADVICE}") from error
    known = {field.name for field in fields(LensConfig)}
    try:
        config = LensConfig(**{name: value for name, value in found.items() if name in known})
    except (TypeError, AttributeError) as error:
        raise AnalysisError(f"{path} is not the config of a lens ({error}): {_ADVICE}") from error
    sizes = (config.d_model, config.num_hidden_layers)
    bounds = zip(sizes, (_MOST_WIDTH, MOST_BLOCKS), strict=True)
    if config.lens_type != LENS_TYPE or not all(type(size) is int and 0 < size <= most for size, most in bounds):
        raise AnalysisError(
            f"{path} describes a lens of type {str(config.lens_type)[:40]!r} and sizes {str(sizes)[:80]}: {_ADVICE}"
        )
    return config


def _check_zip(path: Path, config: LensConfig) -> None:
    """Look at what the file would unpack to: a small one can hold petabytes of nothing."""
    most = _MOST_PICKLE_BYTES + config.num_hidden_layers * (config.d_model + 1) * config.d_model * _WIDEST
    try:
        with ZipFile(path) as file:
            members = file.infolist()
        n_bytes = path.stat().st_size
    except (OSError, BadZipFile, ValueError, NotImplementedError) as error:
        raise AnalysisError(f"{path} cannot be read as a checkpoint of tensors ({error}): {_ADVICE}") from error
    total = sum(member.file_size for member in members)
    if total > min(most, n_bytes) or any(member.compress_type != ZIP_STORED for member in members):
        raise AnalysisError(
            f"{path} is compressed, or unpacks from {n_bytes:,} bytes to {total:,}, where a lens of "
            f"{config.num_hidden_layers} blocks of width {config.d_model} has at most {most:,}: {_ADVICE}"
        )


def _check_state(path: Path, config: LensConfig, state: object) -> None:
    shapes = {"weight": (config.d_model, config.d_model), "bias": (config.d_model,)}
    parts = [part for part in shapes if part == "weight" or config.bias]
    expected = {f"{depth}.{part}": shapes[part] for depth in range(config.num_hidden_layers) for part in parts}
    found = {
        name: tuple(value.shape)
        for name, value in (state.items() if isinstance(state, dict) else ())
        if isinstance(value, Tensor) and value.is_floating_point() and _is_plain(value)
    }
    if found != expected or not isinstance(state, dict) or len(state) != len(expected):
        wrong = sorted(set(map(str, found.items())) ^ set(map(str, expected.items())))
        raise AnalysisError(
            f"{path} holds other tensors than a lens of {config.num_hidden_layers} blocks of width {config.d_model} "
            f"has: {', '.join(wrong)[:200]}: {_ADVICE}"
        )


def _is_plain(tensor: Tensor) -> bool:
    """Say whether each number is in the file: a small one can claim a large tensor, which is one number repeated."""
    is_dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return is_dense and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize


_ADVICE = "choose a folder that `residua lens train` or the tuned-lens package wrote"
