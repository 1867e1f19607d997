"""Every argument of a public call has a name, so that editors and type checkers know it."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, get_args, get_type_hints, is_typeddict

import pytest

import residua
from residua.analysis.lens.lens_settings import LensOptions, LensSettings
from residua.analysis.loader.loader import Loader, LoaderOptions
from residua.capture.replay.generation import _PROMPT_OPTIONS, GenerationOptions
from residua.pipelines.circuits.circuit_settings import SweepOptions, SweepSettings
from residua.pipelines.data.dataset_settings import DatasetOptions, DatasetSettings
from residua.pipelines.setup.capture_settings import CaptureOptions, CaptureSettings
from residua.store.read.stacks import StackedArchive

NOT_OPTIONS = {"LogisticProbe.save", "RidgeProbe.save", "LinearProbe.save"}
"""Methods whose further arguments are the caller's own words, kept with the file."""


def public() -> Iterator[tuple[str, Any]]:
    """Yield every public function and class with its name."""
    yield from ((name, getattr(residua, name)) for name in residua.__all__ if name != "analysis")
    yield from ((name, getattr(residua.analysis, name)) for name in residua.analysis.__all__)
    from residua.pipelines.runs.result import Run

    yield from (("Run", Run), ("StackedArchive", StackedArchive))


def calls() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield every public function, and every public method of a public class that is ours, with its name."""
    for name, found in public():
        if not inspect.isclass(found):
            yield name, found
            continue
        if inspect.isfunction(found.__init__):
            yield name, found.__init__
        for method, value in inspect.getmembers(found, callable):
            if not method.startswith("_") and str(getattr(value, "__module__", "")).startswith("residua."):
                yield f"{name}.{method}", value


def test_no_public_call_takes_arguments_without_names() -> None:
    bare, seen = [], 0
    for name, call in calls():
        seen += 1
        for argument in inspect.signature(call).parameters.values():
            if argument.kind is argument.VAR_KEYWORD and name not in NOT_OPTIONS:
                kind = argument.annotation
                is_named = "Unpack[" in kind if isinstance(kind, str) else any(map(is_typeddict, get_args(kind)))
                bare += [] if is_named else [f"{name}(**{argument.name}: {kind})"]
    assert seen > 80
    assert not bare


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (DatasetOptions, DatasetSettings),
        (CaptureOptions, CaptureSettings),
        (LensOptions, LensSettings),
        (SweepOptions, SweepSettings),
    ],
)
def test_options_are_the_fields_of_their_settings(options: type, settings: type) -> None:
    assert get_type_hints(options) == {field.name: get_type_hints(settings)[field.name] for field in fields(settings)}


def test_options_of_a_loader_are_its_arguments() -> None:
    arguments = get_type_hints(Loader.__init__)
    required = ("archive", "sites", "batch_size", "return")
    assert get_type_hints(LoaderOptions) == {name: kind for name, kind in arguments.items() if name not in required}


def test_options_of_generation_are_those_of_transformers() -> None:
    from transformers import GenerationConfig, GenerationMixin

    known = {*vars(GenerationConfig()), *inspect.signature(GenerationMixin.generate).parameters, "tokenizer"}  # type: ignore[no-untyped-call]
    assert get_type_hints(GenerationOptions).keys() <= known - set(_PROMPT_OPTIONS)
