"""Directions of a page by name: a channel, a saved probe, a tensor of a file, or the logit of a token.

A direction is written ``SITE=WHAT``, or ``SITE[HEAD]=WHAT`` for one head of a site with heads. ``WHAT`` is

* ``channel:17``: one value of the row, or of the head;
* ``logit:TEXT`` or ``logit:17``: how the logit of a token depends on the row, by the LM head of the archive and, if
  there is one, the tuned lens. The final norm is taken as its weight alone: a row's length is left out;
* ``FOLDER``: a saved probe, here or at an address. A probe knows its site, so the folder alone will do;
* ``FILE``, ``FILE#TENSOR``: an array of a ``.npy``, ``.npz`` or ``.safetensors`` file, here or at an address, from
  which it comes whole: one number a channel;
* ``FILE#TENSOR[17]``, ``FILE#TENSOR[:,17]``: a row or a column of a matrix, such as a feature of an autoencoder.

``NAME:=SITE=WHAT`` gives it a name of its own. No file is unpickled, and nothing in one is executed.
"""

import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from residua.analysis.lens.lens import TunedLens
from residua.analysis.lens.lm_head import LMHead, load_lm_head
from residua.analysis.lens.rows import layer_of
from residua.analysis.probes.files import DESCRIPTION, read_probe
from residua.analysis.stats.directions import full_row, read_direction
from residua.store.base.errors import AnalysisError, few
from residua.store.edits.vectors import MAX_VECTOR_BYTES
from residua.store.read.archive import Archive
from residua.store.read.text import token_id
from residua.store.storage.address import is_remote
from residua.store.storage.mirror import fetched

Floats = npt.NDArray[np.float64]
Options: TypeAlias = Mapping[str, Any] | None

MEASURES = ("norm", "distance")
"""What is measured of the rows of every site: their Euclidean norm, and their distance to the mean row."""

_NAMED = re.compile(r"(?:(?P<name>[^=]+?):=)?(?P<rest>.+)", re.DOTALL)
_OF_SITE = re.compile(r"(?P<site>[^=\[\]#/]+?)(?:\[(?P<head>\d+)\])?=(?P<what>.+)", re.DOTALL)
_OF_FILE = re.compile(r"(?P<file>.+?)(?:#(?P<tensor>[^#\[\]]+)?(?:\[(?P<index>\d+|:,\s*\d+)\])?)?", re.DOTALL)
_MATRIX = ".safetensors"
_ARRAYS = (_MATRIX, ".npy", ".npz")


class Direction(NamedTuple):
    """A direction in the space of a site's rows.

    Attributes:
        name: What the page calls it.
        site: A stored site.
        vector: (width,), the heads of a row one after the other.
        bias: What is added to the dot product.
    """

    name: str
    site: str
    vector: npt.ArrayLike
    bias: float = 0.0


Wanted: TypeAlias = str | tuple[str, str, npt.ArrayLike] | Direction
"""A direction as it is asked for: the text that the module's head describes, or name, site and vector."""


def directions_of(
    archive: Archive,
    wanted: Iterable[Wanted],
    lens: str | PathLike[str] | None,
    storage_options: Options = None,
) -> list[Direction]:
    """Read directions and check that each fits its site.

    Args:
        archive: The archive.
        wanted: The directions.
        lens: Folder of a tuned lens, for ``logit:``, or its address.
        storage_options: For addresses, as for `residua.open`.

    Returns:
        The directions; vectors are float64, (width,), and finite. No two have the same name.

    Raises:
        AnalysisError: A text is no direction, or one cannot be read or does not fit its site; the message names it.
        UnknownSiteError: There is no such site.
    """
    found: list[Direction] = []
    for one in wanted:
        for direction in _read(archive, one, lens, storage_options):
            if direction.name in MEASURES:
                raise AnalysisError(
                    f"a direction cannot be called {direction.name!r}, as the page measures that itself"
                )
            taken = sum(other.name == direction.name for other in found)
            name = f"{direction.name} ({direction.site})" if taken else direction.name
            if any(other.name == name for other in found):
                raise AnalysisError(f"two directions are called {name!r}: give one a name, NAME:=SITE=WHAT")
            found.append(direction._replace(name=name))
    return found


def _read(archive: Archive, wanted: Wanted, lens: str | PathLike[str] | None, options: Options) -> list[Direction]:
    if isinstance(wanted, str):
        return _parsed(archive, wanted, lens, options)
    given = wanted if isinstance(wanted, Direction) else Direction(*wanted)
    return [_fitted(archive, given.name, given.site, given.vector, given.bias)]


def _fitted(
    archive: Archive, name: str, site: str, vector: npt.ArrayLike, bias: float = 0.0, *, head: int | None = None
) -> Direction:
    (stored,) = _one_site(archive, site)
    try:
        row = full_row(archive, stored, direction=vector, channel=None, head=head)
    except AnalysisError as error:
        raise AnalysisError(f"the direction {name!r} cannot be used: {error}") from None
    return Direction(name, stored, row, bias)


def _one_site(archive: Archive, site: str) -> tuple[str, ...]:
    names = archive.select(site)
    if len(names) != 1:
        raise AnalysisError(f"{site!r} names {len(names)} sites, and a direction is of one: write {names[0]}=...")
    return names


def _parsed(archive: Archive, text: str, lens: str | PathLike[str] | None, options: Options) -> list[Direction]:
    named = _NAMED.fullmatch(text)
    name, rest = (named["name"], named["rest"]) if named else (None, text)
    match = _OF_SITE.fullmatch(rest)
    if match is None:
        if not is_remote(rest) and not (Path(rest) / DESCRIPTION).is_file():
            raise AnalysisError(
                f"the direction {text!r} names no site: write SITE=WHAT, for example {archive.sites[0]}=channel:0, or "
                "give the folder of a saved probe"
            )
        return _of_probe(archive, name, None, rest, None, options)
    (site,), what = _one_site(archive, match["site"]), match["what"]
    head = None if match["head"] is None else int(match["head"])
    kind, _, value = what.partition(":")
    name = name or (what if head is None else f"{what} (head {head})")
    if kind == "channel" and re.fullmatch(r"\d+", value):
        vector = full_row(archive, site, direction=None, channel=int(value), head=head)
        return [Direction(name, site, vector)]
    if kind == "logit":
        return [_fitted(archive, name, site, _logit(archive, site, value, lens, options), head=head)]
    if _is_folder(what):
        return _of_probe(archive, named and named["name"], site, what, head, options)
    return [_fitted(archive, name, site, _of_file(what, _width(archive, site, head), options), head=head)]


def _is_folder(what: str) -> bool:
    """Say whether a probe is named, and not a file; at an address, files of arrays are known by their names."""
    if not is_remote(what):
        return Path(what).is_dir()
    match = _OF_FILE.fullmatch(what)
    return match is None or PurePosixPath(match["file"]).suffix not in _ARRAYS


def _width(archive: Archive, site: str, head: int | None) -> int:
    return int(np.prod(archive[site].shape[1 if head is None else 2 :]))


def _of_probe(
    archive: Archive, name: str | None, site: str | None, folder: str, head: int | None, options: Options
) -> list[Direction]:
    """Return the vectors of a saved probe: one, or one for each of more than two classes."""
    probe = read_probe(folder, options)
    site = site or probe.about.get("site")
    if not isinstance(site, str):
        raise AnalysisError(f"the probe in {folder} does not say its site: write SITE={folder}")
    target = probe.about.get("target")
    label = name or f"probe of {target if isinstance(target, str) else PurePosixPath(folder).name}"
    classes = [] if probe.classes is None or len(probe.weight) == 1 else [f": {one}" for one in probe.classes]
    return [
        _fitted(archive, label + kind, site, weight, float(bias), head=head)
        for weight, bias, kind in zip(probe.weight, probe.bias, classes or [""], strict=True)
    ]


def _of_file(what: str, width: int, options: Options) -> Floats:
    match = _OF_FILE.fullmatch(what)
    if match is None or not (is_remote(what) or Path(match["file"]).is_file()):
        raise AnalysisError(
            f"there is no file or saved probe {what!r}: give channel:NUMBER, logit:TOKEN, the folder of a probe, or a "
            ".npy, .npz or .safetensors file, with #TENSOR[NUMBER] for a row of a matrix in it"
        )
    with fetched(match["file"], options) as path:
        return _of_array(what, path, match["tensor"], match["index"], width)


def _of_array(what: str, path: Path, tensor: str | None, index: str | None, width: int) -> Floats:
    if index is None and tensor is None and path.suffix != ".npz":
        return read_direction(path)
    try:
        found = _of_safetensors(path, tensor, index) if path.suffix == _MATRIX else _of_numpy(path, tensor, index)
    except (OSError, ValueError, KeyError, SafetensorError, zipfile.BadZipFile) as error:
        raise AnalysisError(f"the direction {what!r} cannot be read: {error}") from error
    if found.dtype.kind not in "fiu":
        raise AnalysisError(f"{what!r} holds {found.dtype}, and a direction is numbers: save them as floats")
    if found.ndim == 1 and len(found) != width and index is not None:
        other = f"[:,{index}]" if index.isdigit() else "[NUMBER]"
        raise AnalysisError(f"{what!r} has {len(found)} numbers, and the site has {width}: ask for {other}")
    return found.astype(np.float64)


def _of_safetensors(path: Path, tensor: str | None, index: str | None) -> npt.NDArray[np.generic]:
    """Read one row or column and no more: the file of an autoencoder has gigabytes."""
    with safe_open(path, "pt") as file:
        tensor = _chosen(path, tensor, list(file.keys()))
        values = file.get_slice(tensor)
        shape = values.get_shape()
        if index is None:
            _check_size(path, int(np.prod(shape)))
            whole: npt.NDArray[np.generic] = values[...].double().numpy()
            return whole
        axis, number = int(index.startswith(":")), _number(index)
        if len(shape) != 2 or number >= shape[axis]:
            raise ValueError(f"{tensor} has shape {shape}, and no [{index}]")
        picked = values[:, number : number + 1] if axis else values[number : number + 1]
        found: npt.NDArray[np.generic] = picked.double().numpy().reshape(-1)
    return found


def _of_numpy(path: Path, tensor: str | None, index: str | None) -> npt.NDArray[np.generic]:
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as members:
            names = [name.removesuffix(".npy") for name in members.namelist()]
            tensor = _chosen(path, tensor, names)
            if members.getinfo(f"{tensor}.npy").file_size > MAX_VECTOR_BYTES:
                raise ValueError(f"{tensor} is over {MAX_VECTOR_BYTES >> 20} MiB: save it as .safetensors")
            with members.open(f"{tensor}.npy") as member:
                values = np.lib.format.read_array(member, allow_pickle=False)
    else:
        values = np.lib.format.open_memmap(path, mode="r")
    if index is None:
        return np.asarray(values)
    try:
        return np.asarray(values[:, _number(index)] if index.startswith(":") else values[_number(index)])
    except IndexError:
        raise ValueError(f"the array has shape {values.shape}, and no [{index}]") from None


def _number(index: str) -> int:
    return int(re.sub(r"[:,\s]", "", index))


def _chosen(path: Path, tensor: str | None, names: Sequence[str]) -> str:
    chosen = tensor if tensor is not None else names[0] if len(names) == 1 else None
    if chosen not in names:
        raise ValueError(f"{path.name} holds {few(sorted(names))}: name one of them, {path.name}#TENSOR")
    return str(chosen)


def _check_size(path: Path, n_values: int) -> None:
    if n_values * 8 > MAX_VECTOR_BYTES:
        raise ValueError(f"{n_values:,} numbers of {path.name} were asked for: ask for a row, {path.name}#TENSOR[0]")


def _logit(archive: Archive, site: str, token: str, lens: str | PathLike[str] | None, options: Options) -> Floats:
    """Return the gradient of a token's logit by the row, with the final norm as its weight alone."""
    number = int(token) if token.isdigit() else token_id(archive.tokenizer, token)
    tuned = None if lens is None else TunedLens.load(lens, storage_options=options)
    head = load_lm_head(archive.head) if tuned is None else tuned.head
    if head.spec.activation is not None:
        raise AnalysisError(
            f"logit:{token} is no direction: the LM head of {archive.place} has a layer that is not linear"
        )
    if not 0 <= number < head.vocabulary_size:
        raise AnalysisError(f"there is no logit of token {number}: the model has {head.vocabulary_size:,} of them")
    vector = _unembedded(head, number)
    if tuned is None or layer_of(site) == tuned.config.num_hidden_layers:
        return vector
    if layer_of(site) not in tuned.translators:
        raise AnalysisError(
            f"logit:{token}: the lens {lens} was not trained at {site}: choose another site, or no lens"
        )
    pulled_back: Floats = tuned.translators[layer_of(site)].weight.double().numpy() @ vector
    return pulled_back


def _unembedded(head: LMHead, number: int) -> Floats:
    parameters = {name: tensor.double().numpy() for name, tensor in head.parameters.items() if "unembed" not in name}
    vector: Floats = head.parameters["unembed.weight"][number].double().numpy()
    if "project_out.weight" in parameters:
        vector = vector @ parameters["project_out.weight"]
    if "norm.weight" in parameters:
        vector = vector * (parameters["norm.weight"] + head.spec.weight_offset)
    if head.spec.norm == "layer":
        vector = vector - vector.mean()  # a layer norm takes away the mean of the row
    return vector
