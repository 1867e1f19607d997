"""The images of a replay: given again by the caller, compared with those of the capture, and processed as then.

An archive keeps no images, only what each is known by (`residua.pipelines.images.images`) and what its processor was.
So a replay is given the images and the processor, and refuses others: the same rows would be put into another run.
"""

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from residua.capture.forward.example_inputs import OF_TOKENS, ExampleInputs, joined
from residua.capture.runtime.devices import input_device
from residua.capture.runtime.wrappers import core_of
from residua.capture.sites.towers import image_token_of
from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.pipelines.images.encoders import processed, processor_identity
from residua.pipelines.images.images import GivenImage, given_image, open_image
from residua.store.base.errors import PlanError
from residua.store.base.naming import named
from residua.store.examples.index import IMAGES, OTHER_INPUTS
from residua.store.format.row_columns import HAS_IMAGES
from residua.store.read.archive import Archive


def replayed_images(
    archive: Archive, model: torch.nn.Module, examples: Sequence[int], images: Sequence[object], processor: object
) -> dict[str, Tensor]:
    """Return what a model gets of the images of some examples, by name, as in their capture.

    Args:
        archive: The archive of a vision-language model's tokens.
        model: The model.
        examples: Numbers of examples.
        images: For each of them its image, or a list of its images in order; None or an empty list if it has none.
        processor: The processor of the capture.

    Raises:
        PlanError: The archive has no images, an image or the processor is another one than in the capture, or images of
            these examples do not fit into one batch.
        DatasetError: A value is no image.
    """
    _check(archive, model, examples, images, processor)
    known = archive.example_table.table([IMAGES, OTHER_INPUTS])
    found = []
    for number, given in zip(examples, images, strict=True):
        where = f"images of example {number}"
        opened = [_given(one, where) for one in _listed(given)]
        _compare(opened, known[IMAGES][number].as_py() or [], where, archive)
        names = [name for name in known[OTHER_INPUTS][number].as_py() or [] if name not in OF_TOKENS]
        if names:
            found.append(_processed(archive, model, processor, number, opened, names))
    if len({one.signature for one in found}) > 1:
        raise PlanError(
            f"the images of {named('examples', list(examples))} have different shapes for the model, and ran in passes "
            "of their own: replay these examples one after another"
        )
    if not found:
        return {}
    core: Any = core_of(model)
    return joined(found, 0, device=input_device(core), dtype=core.dtype)


def _check(
    archive: Archive, model: torch.nn.Module, examples: Sequence[int], images: Sequence[object], processor: object
) -> None:
    """Raise PlanError unless the archive has images of text, and the processor is that of its capture."""
    if HAS_IMAGES not in archive.plan.dataset or image_token_of(model) is None:
        raise PlanError(f"images were given, and {archive.place} has no examples of text with images: leave them out")
    if len(images) != len(examples):
        raise PlanError(
            f"images of {len(images)} examples were given, and {len(examples)} examples: give a list for each example"
        )
    if processor is None:
        raise PlanError(
            "images were given without a processor, which makes of them what the model takes: pass that of the model "
            "(transformers.AutoProcessor.from_pretrained) as processor"
        )
    digest, asked = processor_identity(processor)["digest"], archive.plan.rules.get("processor")
    if digest != asked:
        raise PlanError(
            f"{type(processor).__name__} has other settings than the processor with which {archive.place} was "
            "captured: load that of the captured model; the archive's provenance lists its settings"
        )


def _listed(given: object) -> list[object]:
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


def _given(value: object, where: str) -> GivenImage:
    """Return an image that the caller gives; a path is the caller's own, and may lead anywhere."""
    if isinstance(value, str | PathLike):
        value = Path(fspath(value)).read_bytes()
    return given_image(value, folder=None, where=where)


def _compare(given: Sequence[GivenImage], known: Sequence[str], where: str, archive: Archive) -> None:
    if len(given) != len(known):
        raise PlanError(f"{where}: {len(given)} were given, and it was captured with {len(known)}")
    for place, (one, digest) in enumerate(zip(given, known, strict=True)):
        if one.sha256 != digest:
            raise PlanError(
                f"{where}: image {place} is not the one of the capture (its SHA-256 begins with {one.sha256[:12]}, and "
                f"with {digest[:12]} in {archive.place}). An image that was captured from a file is known by the bytes "
                "of that file: give its path or its bytes; one that was given as pixels is known by these"
            )


def _processed(
    archive: Archive,
    model: torch.nn.Module,
    processor: Any,
    number: int,
    images: Iterable[GivenImage],
    names: Sequence[str],
) -> ExampleInputs:
    """Return the tensors of one example; its text does not matter to them, so placeholders take its place."""
    where = f"images of example {number}"
    opened = [open_image(one, max_pixels=DatasetSettings().max_image_pixels, where=where) for one in images]
    word, token = str(processor.image_token), cast("int", image_token_of(model))
    made: Mapping[str, Tensor] = processed(processor, where, text=[" ".join([word] * len(opened))], images=[opened])
    input_ids = archive.example_table.tokens(number)
    if int((made["input_ids"] == token).sum()) != int((input_ids == token).sum()):
        raise PlanError(f"{where}: they stand for another number of tokens than in the capture: was the model changed?")
    missing = [name for name in names if name not in made]
    if missing:
        raise PlanError(f"{where}: the processor gave {', '.join(missing)} in the capture, and does not now")
    return ExampleInputs(input_ids=input_ids, tensors={name: made[name] for name in names})
