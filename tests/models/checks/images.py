"""What is checked of a model over images, and of the vision tower of a model over images and text: rows of patches.

Each image also runs alone; the model's own hidden states and attention weights decide. A tower is asked for by the
sites of the full model, and compared with what it gives by itself.
"""

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from inspect import Parameter, signature
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

import residua
from residua.capture.sites.names_to_modules import resolve_sites
from residua.store.base.errors import UnknownSiteError
from tests.models.checks.calls import call_of, check_modules
from tests.models.checks.language import Checks, Rows, note_reasons
from tests.models.checks.truth import LOGITS, ModuleLog, difference, eager, states_of
from tests.models.findings import Record, StackRecord

_N_IMAGES = 3


def takes_only_images(model: PreTrainedModel) -> bool:
    """Return whether a model reads images, and nothing else is needed."""
    takes = signature(model.forward).parameters
    return ("pixel_values" in takes or "grid_thw" in takes) and "input_ids" not in takes


def needs_images(model: PreTrainedModel) -> bool:
    """Return whether a model cannot be called without images."""
    takes = signature(model.forward).parameters
    compares = {"pixel_values", "return_loss"} <= set(takes)  # as CLIP does
    return compares or ("pixel_values" in takes and takes["pixel_values"].default is Parameter.empty)


def check_images(model: PreTrainedModel, record: Record) -> None:
    """Check all that a model over images offers; what it lacks is noted with the reason that Residua gives."""
    call = call_of(model, record.key)
    log = ModuleLog(model)
    with log.watching(), torch.no_grad():
        model(**call)
    record.runs = True
    sites = record.attempt("sites", residua.model_sites, model) or {}
    record.offer(sites)
    record.n_blocks = len(record.offered.get("resid_post", []))
    if sites:
        record.attempt("images", _check_rows, model, model, record, record, sites, "")
    record.attempt("modules", check_modules, model, record, call, log)
    record.attempt("reasons", note_reasons, model, record, sites)


def check_tower(model: PreTrainedModel, record: Record) -> None:
    """Check the sites of the vision tower of a model over tokens and images, which are named ``vision.``."""
    towers = [
        module
        for path, module in model.named_modules()
        if path and isinstance(module, PreTrainedModel) and takes_only_images(module)
    ]
    if not towers:
        return
    tower = towers[0]
    try:
        sites = resolve_sites(model, "vision.*")
    except UnknownSiteError as error:
        record.refusal += f" vision.resid_post: {str(error).partition('separated by commas. ')[2].partition(': ')[2]}"
        return
    record.offer(sites)
    own = {name.removeprefix("vision."): info for name, info in sites.items()}
    noted = StackRecord(record, "vision", sum(name.startswith("resid_post.") for name in own))
    _check_rows(model, tower, record, noted, own, "vision.")


class _ImageTruth:
    """What a model gives for each image alone, as `tests.models.checks.truth.Truth` has it of tokens."""

    def __init__(self, full: PreTrainedModel, model: PreTrainedModel, images: list[dict[str, Tensor]]) -> None:
        self._model = model
        self._images = images
        outputs = [self._run(each, output_hidden_states=True) for each in images]
        self.hidden = [_of_one(states_of(output, "hidden_states")) for output in outputs]
        self.logits: list[Tensor] = []
        self.log = ModuleLog(full)
        with self.log.watching():
            self._run(images[-1])
        self.weights: list[Any] = [None] * len(images)
        with eager(model), suppress(IndexError):  # Llama 4's tower cannot return its weights
            found = [self._run(each, output_attentions=True) for each in images]
            if all(difference(_result(f), _result(o)) <= LOGITS for f, o in zip(found, outputs, strict=True)):
                self.weights = [states_of(output, "attentions") for output in found]
        self.ids: list[list[int]] = []

    def _run(self, image: dict[str, Tensor], **options: Any) -> Any:
        with torch.no_grad():
            return self._model(**image, **options)

    def again(self) -> Tensor:
        """Run the last image once more, and return the model's logits, or its last hidden state."""
        return _result(self._run(self._images[-1]))


def _of_one(states: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
    """Return the states of one image as those of a batch of one."""
    return None if states is None else tuple(each if each.ndim > 2 else each[None] for each in states)


class _Cut(hf.Qwen2VLImageProcessorPil):
    """Cuts images into patches, of the shape that a model takes."""

    shape: tuple[int, ...] = ()

    def preprocess(self, *args: Any, **kwargs: Any) -> Any:
        """As its parent, with the axes of a patch."""
        made: Any = super().preprocess(*args, **kwargs)
        made["pixel_values"] = made["pixel_values"].reshape(-1, *self.shape)
        if self.merge_size == 1:
            made["image_merge_sizes"] = torch.ones(len(made["image_grid_thw"]), dtype=torch.long)
        return made


class _Placed(hf.Siglip2ImageProcessorPil):
    """Cuts images into patches, and tells column and row of each, as Gemma 4's processor does for many more."""

    def preprocess(self, *args: Any, **kwargs: Any) -> Any:
        """As its parent, with places instead of a mask and shapes."""
        made: Any = super().preprocess(*args, **kwargs)
        ((rows, columns),) = np.asarray(made.pop("spatial_shapes")).tolist()
        del made["pixel_attention_mask"]
        places = [[number % columns, number // columns] for number in range(rows * columns)]
        made["image_position_ids"] = torch.tensor([places])
        return made


def _processor_of(model: PreTrainedModel) -> tuple[Any, tuple[int, int]]:
    """Return an image processor that gives what a model takes, and height and width of images for it."""
    takes, config = signature(model.forward).parameters, model.config
    if not {"grid_thw", "spatial_shapes", "pixel_position_ids"} & set(takes):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        return hf.ViTImageProcessorPil(size={"height": height, "width": width}), (height, width)
    layers = (m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv3d)))
    shape, patch = tuple(next(layers).weight.shape[1:]), config.patch_size
    patch = patch if isinstance(patch, int) else patch[-1]
    side = 8 * patch
    if "spatial_shapes" in takes:
        made: Any = hf.Siglip2ImageProcessorPil(patch_size=patch, max_num_patches=64)
        return made, (side, side)
    if "pixel_position_ids" in takes:
        return _Placed(patch_size=patch, max_num_patches=64), (side, side)
    merged = 1 if "merge_sizes" in takes else getattr(config, "spatial_merge_size", None) or 2
    cut = _Cut(
        patch_size=patch,
        temporal_patch_size=prod(shape) // (3 * patch * patch),
        merge_size=merged,
        size={"shortest_edge": patch * patch, "longest_edge": 4 * side * side},
    )
    cut.shape = (prod(shape),) if config.model_type.startswith("hunyuan") else shape
    return cut, (side, 2 * side)


def _inputs(model: PreTrainedModel, made: Any) -> dict[str, Tensor]:
    """Return the arguments of a call of a model alone for what a processor makes of one image."""
    takes = list(signature(model.forward).parameters)
    if "pixel_position_ids" in takes:
        places = made["image_position_ids"]
        is_patch = (places != -1).all(-1)[0]
        return {"pixel_values": made["pixel_values"][:, is_patch], "pixel_position_ids": places[:, is_patch]}
    if "grid_thw" not in takes:
        return {name: made[name] for name in takes if name in made}
    pixels = made["pixel_values"]
    leads = type(model).__name__.startswith("PaddleOCR")
    name = "pixel_values" if "pixel_values" in takes else takes[0]
    ones = {"merge_sizes": torch.ones(1, dtype=torch.long)} if "merge_sizes" in takes else {}
    return {name: pixels[None] if leads else pixels, "grid_thw": made["image_grid_thw"], **ones}


def _result(output: Any) -> Tensor:
    found = (getattr(output, name, None) for name in ("logits", "last_hidden_state", "predicted_depth"))
    return next(each for each in found if isinstance(each, Tensor))


class _TowerRows(Rows):
    """Rows whose sites are named without their prefix."""

    def __init__(self, archives: list[Any], prefix: str) -> None:
        super().__init__(archives)
        self._of = {name.removeprefix(prefix): archive for archive in archives for name in archive.sites}
        self._prefix = prefix
        self.archives = [self]
        self.sites = tuple(self._of)

    def example(self, number: int, site: str) -> dict[str, Any]:
        """As an archive's own."""
        name = f"{self._prefix}{site}"
        return {site: self._of[site].example(number, name)[name]}


def _check_rows(
    full: PreTrainedModel,
    model: PreTrainedModel,
    record: Record,
    noted: Record | StackRecord,
    sites: Mapping[str, Any],
    prefix: str,
) -> None:
    processor, (height, width) = _processor_of(model)
    random = np.random.default_rng(3)
    images = [Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(_N_IMAGES)]
    truth = _ImageTruth(full, model, [_inputs(model, processor(image, return_tensors="pt")) for image in images])
    with tempfile.TemporaryDirectory() as folder:
        archives = []
        for kind, chosen in (
            ("rows", [name for name in sites if not name.startswith("pattern.")]),
            ("patterns", [name for name in sites if name.startswith("pattern.")]),
        ):
            if not chosen:
                continue
            result = residua.capture_dataset(
                full,
                [{"image": image} for image in images],
                sites=",".join(f"{prefix}{name}" for name in chosen),
                out=Path(folder) / kind,
                processor=processor,
            )
            record.notes = list(dict.fromkeys([*record.notes, *result.notes]))
            archives.append(result.archive)
        rows = _TowerRows(archives, prefix)
        n_positions = len(rows(0, next(iter(sites))))
        truth.ids = [list(range(n_positions))] * _N_IMAGES
        Checks(full, noted, sites, truth, rows, tapped=model).all()
