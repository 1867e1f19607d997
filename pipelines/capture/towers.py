"""The capture of the vision tower and the text model of one model, over the same rows of a dataset.

Rows of a tower are patches, and those of a text model tokens. So each has an archive of its own in the folder `out`,
which an ordinary capture job fills, resumes and seals. The text model's pass reads the dataset first. The tower's pass
reads the same rows again: each image is an example, and the tower runs alone on it, as it runs in the model.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from residua.capture.sites.anatomy import takes_pixels
from residua.capture.sites.names_to_modules import resolve_sites
from residua.capture.sites.towers import Tower, has_towers_only, towers_of
from residua.pipelines.capture.dataset_job import CaptureRequest, DatasetCapture
from residua.pipelines.capture.images import image_dataset, ran_alone
from residua.pipelines.capture.result import CaptureResult
from residua.pipelines.capture.stacks import run_stacks
from residua.pipelines.data.dataset import SOURCE_COLUMNS
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.store.base.errors import PlanError
from residua.store.base.naming import named
from residua.store.examples.table import ExampleTable
from residua.store.format.create import bring_archive
from residua.store.format.site_aliases import canonical
from residua.store.format.stacks import making_stacks
from residua.store.storage.destination import Destination
from residua.store.storage.place import ResultPlace

_VISION, _TEXT = "vision", "text"


def sites_of_both(sites: str) -> dict[str, str]:
    """Return the sites of the text model and of the vision tower, by name; empty if they are of one of them.

    Sites without a prefix mean the text model, as they do where they stand alone.
    """
    words = [canonical(word.strip()) for word in sites.split(",") if word.strip()]
    of_tower = [word for word in words if word.startswith(f"{_VISION}.")]
    of_text = [word for word in words if word not in of_tower]
    if not of_tower or not of_text:
        return {}
    prefixed = (word if word.startswith((f"{_TEXT}.", "module:")) else f"{_TEXT}.{word}" for word in of_text)
    return {_TEXT: ",".join(prefixed), _VISION: ",".join(of_tower)}


def capture_both(model: Any, place: ResultPlace, request: CaptureRequest) -> CaptureResult:
    """Capture vision tower and text model; the arguments are those of `capture_dataset`.

    Raises:
        PlanError: The dataset can be read only once, or a setting is of tokens alone.
        UnknownSiteError: The model has no such parts, or they lack a site.
    """
    _refuse(request)
    settings = request.settings
    model, request = request.loaded(model, lambda _: True)
    sites = sites_of_both(settings.site_patterns)
    for own in sites.values():
        resolve_sites(model, own)
    if settings.image_column is None:
        raise PlanError(
            f"{named('sites', settings.site_patterns)} are of images and of text: name the column of images by "
            f"{named('image_column')}"
        )
    both = _Both(model, place.out, request)
    with making_stacks(place.out, (_VISION, _TEXT)), ExitStack() as stack:
        return run_stacks(model, place, both.jobs(sites, stack), request)


def _refuse(request: CaptureRequest) -> None:
    """Raise PlanError for what both parts cannot be captured with."""
    settings = request.settings
    if isinstance(request.dataset, Iterator):
        raise PlanError(
            f"{named('sites', settings.site_patterns)} are of images and of text, and the dataset is read once for "
            "each: give one that can be read twice, such as a list, a datasets.Dataset or a path"
        )
    name = "generate" if settings.generate is not None else "positions" if settings.rule.column else ""
    if name:
        raise PlanError(
            f"{named(name, getattr(settings, name))} is about tokens, and {named('sites', settings.site_patterns)} "
            "have rows of patches, too: capture the sites of each in a run of its own"
        )


@dataclass(frozen=True)
class _Both:
    """The jobs of the two parts of one model."""

    model: PreTrainedModel
    out: Destination
    request: CaptureRequest

    def jobs(self, sites: dict[str, str], stack: ExitStack) -> Iterator[tuple[str, DatasetCapture]]:
        """Yield the jobs of the text model and of the tower; what they need of the disk goes away with `stack`."""
        towers = towers_of(self.model)
        for name, own in sites.items():
            yield name, self._job(towers[name], own, stack)

    def _job(self, part: Tower, sites: str, stack: ExitStack) -> DatasetCapture:
        of_text, processor = part.name == _TEXT, self.request.processor
        settings = replace(self.request.settings, sites=sites)
        settings = settings if of_text else _of_images(settings)
        images = None
        if not (of_text and has_towers_only(self.model)):
            rows = None if of_text else self._rows_of_text()
            images = image_dataset(part.module, self.out.path, settings, processor, rows)
        if images is not None:
            stack.enter_context(images)
        tokenizer = self.request.tokenizer or getattr(processor, "tokenizer", None)
        own = replace(self.request, settings=settings, tokenizer=None if takes_pixels(part.module) else tokenizer)
        job = DatasetCapture(part.module, self.out.inside(part.name), own, images=images)
        job.notes.extend(filter(None, [ran_alone(self.model, part)]))
        return job

    def _rows_of_text(self) -> frozenset[int]:
        """Return the rows of the dataset that the text model's examples were made of."""
        column = SOURCE_COLUMNS[0]
        of_text = self.out.inside(_TEXT)
        bring_archive(of_text)
        table = ExampleTable(of_text.path / "examples")
        return frozenset(table.table([column])[column].to_pylist())


def _of_images(settings: CaptureSettings) -> CaptureSettings:
    """Return the settings without those that are about text."""
    return replace(
        settings,
        text_column=None,
        max_tokens=None,
        max_length=None,
        long_examples=None,
        min_length=1,
        add_special_tokens=None,
        chat_template=None,
        add_generation_prompt=False,
        tools=None,
        chat_template_kwargs=None,
    )
