"""The files of a tuned lens, in the folder format of the `tuned-lens` package (0.2.0), read without trusting them.

``params.pt`` is written by `torch.save`. For every layer it holds ``{layer}.weight`` and ``{layer}.bias`` of a linear
map whose output is added to its input. A lens numbers points of the residual stream by the block that reads them:
layer 2 is the input of block 2, which is ``resid_pre.2`` and ``resid_post.1``. ``residua.json``, if present, lists the
layers that were trained; at all others the lens is the logit lens.

Files are loaded with `weights_only`, so no code in them runs, and sizes are checked before memory is taken.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard
from zipfile import ZIP_STORED, BadZipFile, ZipFile

from residua.store.base.errors import PlanError
from residua.store.base.untrusted import parse_json
from residua.store.format.site_names import Site

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE, PARAMETERS_FILE, LAYERS_FILE = "config.json", "params.pt", "residua.json"
BLOCKS_BEFORE = {"resid_pre": 0, "resid_post": 1}  # plus the layer of the site
_MAX_JSON_BYTES = 2**20


def lens_layer(site: Site) -> int:
    """Return the number of blocks before `site`, which is its layer in a lens.

    Raises:
        PlanError: The site is not a `resid_pre` or `resid_post`.
    """
    if site.layer is None or site.kind not in BLOCKS_BEFORE:
        raise PlanError(
            f"a lens was requested at {site}, but lenses decode the residual stream between blocks: choose resid_pre "
            "or resid_post sites"
        )
    return site.layer + BLOCKS_BEFORE[site.kind]


def read_linear_map(folder: Path, site: Site) -> tuple["Tensor", "Tensor"]:
    """Return the linear map of a lens at a site: weight, (width, width), and bias, (width,), as stored.

    Raises:
        PlanError: The folder has no lens for the site, or its files are not those of a lens.
    """
    import torch

    layer, path = lens_layer(site), folder / PARAMETERS_FILE
    if not path.is_file():
        raise PlanError(f"there is no lens at {folder}: name a folder that `residua lens train` wrote")
    trained = read_trained_layers(folder)
    if trained is not None and layer not in trained:
        raise PlanError(f"the lens at {folder} was not trained at {site}: choose another site, or train it there")
    state = read_parameters(path)
    weight = state.get(f"{layer}.weight")
    if not isinstance(weight, torch.Tensor):
        raise PlanError(f"{path} has no lens for {site}: it has no tensor {layer}.weight")
    if not is_stored_tensor(weight) or weight.ndim != 2 or weight.shape[0] != weight.shape[1]:
        raise PlanError(f"{path} has no affine map for {site}: {layer}.weight has shape {tuple(weight.shape)}")
    bias = state.get(f"{layer}.bias", torch.zeros(len(weight)))
    if not is_stored_tensor(bias) or bias.shape != weight.shape[:1]:
        raise PlanError(f"{path} has no affine map for {site}: {layer}.bias does not fit a width of {len(weight)}")
    return weight, bias


def read_trained_layers(folder: Path) -> list[object] | None:
    """Return the layers that ``residua.json`` lists, or None if there is no such file.

    Raises:
        PlanError: The file lists no layers.
    """
    path = folder / LAYERS_FILE
    if not path.is_file():
        return None
    try:
        content: Any = parse_json(path.read_bytes() if path.stat().st_size <= _MAX_JSON_BYTES else b"")
        found = content["depths"]
    except (ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{path} does not list the layers of a lens ({error}): train the lens again") from error
    if not isinstance(found, list):
        raise PlanError(f"{path} does not list the layers of a lens: train the lens again")
    return found


def read_parameters(path: Path, *, most_bytes: int | None = None) -> dict[str, object]:
    """Read a ``params.pt``. Its values may be anything that `torch.load` returns; see `is_stored_tensor`.

    Args:
        path: The file.
        most_bytes: Most bytes that it may unpack to; by default its own size.

    Raises:
        PlanError: The file is missing, compressed, too large, or not a dictionary of tensors.
    """
    import torch

    try:
        with ZipFile(path) as file:
            members = file.infolist()
        n_bytes = path.stat().st_size
    except (OSError, BadZipFile, ValueError, NotImplementedError) as error:
        raise PlanError(f"{path} cannot be read as the tensors of a lens ({error})") from error
    total = sum(member.file_size for member in members)  # a small file can unpack to petabytes of zeros
    most = n_bytes if most_bytes is None else min(most_bytes, n_bytes)
    if total > most or any(member.compress_type != ZIP_STORED for member in members):
        raise PlanError(
            f"{path} is compressed, or unpacks from {n_bytes:,} bytes to {total:,}, where a lens has at most {most:,}"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds of errors for a malformed pickle
        raise PlanError(f"{path} cannot be read as the tensors of a lens ({error})") from error
    if not isinstance(state, dict):
        raise PlanError(f"{path} cannot be read as the tensors of a lens: it holds a {type(state).__name__}")
    return state


def is_stored_tensor(value: object) -> "TypeGuard[Tensor]":
    """Whether `value` is a dense floating-point tensor with each of its numbers in the file.

    Other tensors can claim any size: one number that is repeated, or none at all.
    """
    import torch

    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.untyped_storage().nbytes() >= value.numel() * value.itemsize
    )
