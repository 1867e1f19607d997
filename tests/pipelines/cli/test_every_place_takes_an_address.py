"""Every public function and command that takes a place takes an address: found by their signatures, not by a list.

Nothing lies at the address. So each call has to end with an error that names it as it was given: what reads from it has
asked the server, and what cannot be there says so. What took the address for a path would make a folder `http:` here,
or name it with one slash.
"""

import argparse
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import residua
from residua.analysis.lens.checkpoint import LensConfig
from residua.analysis.lens.lens import TunedLens
from residua.analysis.lens.lm_head import LMHead
from residua.analysis.probes.linear_probe import RidgeProbe
from residua.pipelines.cli.main import _parser, main
from residua.store.base.errors import ResiduaError
from residua.store.format.sidecars import LMHeadSpec
from tests.models.tiny import TINY
from tests.ragged import MODEL
from tests.servers.files import FileServer, serving_files
from tests.store.small_archive import make_archive

pytestmark = pytest.mark.timeout(300)
OTHERS = {"model", "dataset", "cache"}
"""Arguments that name a model, a dataset, or a folder that has to be on this machine."""

Call = Callable[..., Any]


def is_place(parameter: inspect.Parameter) -> bool:
    annotation = str(parameter.annotation)
    return parameter.name not in OTHERS and any(word in annotation for word in ("PathLike", "Archive |"))


def callables() -> Iterator[tuple[str, Call]]:
    """Yield all public functions, classes, and methods of classes that are called on the class or on an object."""
    for module in (residua, residua.analysis):
        for name in module.__all__:
            found = getattr(module, name)
            if inspect.isclass(found) and not issubclass(found, BaseException):
                yield f"{module.__name__}.{name}", found
                for method, function in inspect.getmembers(found, callable):
                    if not method.startswith("_") and hasattr(function, "__qualname__"):
                        yield f"{module.__name__}.{name}.{method}", function
            elif inspect.isfunction(found):
                yield f"{module.__name__}.{name}", found


PLACES = [
    (name, parameter.name)
    for name, call in callables()
    for parameter in inspect.signature(call).parameters.values()
    if is_place(parameter)
]
CALLS = dict(callables())


def commands(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the words of each command, and its parser."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield words, parser
    for action in inner:
        for word, command in action.choices.items():
            yield from commands(command, (*words, word))


COMMANDS = dict(commands(_parser()))
ARGUMENTS = [
    (words, action.dest)
    for words, parser in COMMANDS.items()
    for action in parser._actions
    if "address" in (action.help or "") and "Dask" not in (action.help or "")
]


ALSO = {
    ("capture", "out"): ("model", "dataset"),
    ("pack", "out"): ("purpose",),
    ("top", "archive"): ("channel",),
    ("top", "file"): ("channel",),
}
"""Arguments that a command needs besides, though its parser does not say so."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileServer]:
    with serving_files(tmp_path_factory.mktemp("nothing")) as server:
        yield server


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return an argument for every name that a call may need besides the address."""
    folder = tmp_path_factory.mktemp("given")
    archive = make_archive(folder / "a.zarr")
    (folder / "edits.yaml").write_text("[{edit: zero, site: resid_post.0}]")
    pair = {"clean": [5, 6], "corrupted": [5, 7], "answer": 8, "wrong": 9}
    (folder / "pairs.jsonl").write_text(json.dumps(pair))
    return {
        **dict.fromkeys(("archive", "path", "first", "second"), archive),
        "source": archive,
        "address": "http://127.0.0.1:1/none.zarr",
        "archives": [archive, archive],
        "condition": "position > 1",
        "detection_pattern": "induction_head",
        "channel": "0",
        "model": TINY["gpt2"](),
        "dataset": [[5, 6, 7]],
        "examples": [0],
        "prompts": [[5, 6, 7]],
        "n_examples": 1,
        "pairs": [pair],
        "sites": "resid_post.0",
        "site": "resid_post.0",
        "where": "position > 1",
        "target": "position > 1",
        "to": "npy",
        "folder": folder / "results",
        "out": folder / "out",
        "batch_size": 4,
        "purpose": "hub",
        "pairs_file": folder / "pairs.jsonl",
    }


def arguments(call: Call, given: dict[str, Any], name: str, value: object) -> dict[str, Any]:
    needed = [
        parameter.name
        for parameter in inspect.signature(call).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    found = {each: given[each] for each in needed if each not in (name, "self")}
    found[name] = [value] if name == "archives" else value
    return found


def self_of(call: Call, name: str) -> dict[str, Any]:
    """Return the object that a method is called on, if it is called on one."""
    if "self" not in inspect.signature(call).parameters:
        return {}
    if name.split(".")[-2] == "TunedLens":
        head = LMHead(LMHeadSpec(norm="none", dtype="float32"), {"unembed.weight": torch.eye(3)})
        config = LensConfig(base_model_name_or_path="none", d_model=3, num_hidden_layers=1)
        return {"self": TunedLens(head, {}, config)}
    return {"self": RidgeProbe().fit(np.eye(3), np.arange(3.0))}


def called(call: Call, **given: Any) -> None:
    """Call a function, and enter the context that it returns, if it does."""
    with call(**given) as _:
        pass


@pytest.mark.parametrize(("name", "parameter"), PLACES)
def test_a_function_asks_there_or_names_the_address(
    name: str,
    parameter: str,
    given: dict[str, Any],
    server: FileServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    address, call = f"{server.url}/none.zarr", CALLS[name]
    with pytest.raises((ResiduaError, FileNotFoundError)) as caught:
        called(call, **self_of(call, name), **arguments(call, given, parameter, address))
    assert address in str(caught.value)
    assert not list(tmp_path.glob("http:*"))


@pytest.mark.parametrize(("words", "argument"), ARGUMENTS)
def test_a_command_asks_there_or_names_the_address(
    words: tuple[str, ...],
    argument: str,
    given: dict[str, Any],
    server: FileServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    address = f"{server.url}/none.zarr"
    values = {
        **given,
        **dict.fromkeys(("model", "dataset"), MODEL),
        "pairs": given["pairs_file"],
        argument: address,
    }
    line = list(words)
    for action in COMMANDS[words]._actions:
        if action.required or action.dest in (argument, *ALSO.get((words[0], argument), ())):
            value = values[action.dest]
            line += [*action.option_strings[:1], *map(str, value if isinstance(value, list) else [value])]
    assert main(line) != 0
    assert address.removesuffix(".zarr") in capsys.readouterr().err
    assert not list(tmp_path.glob("http:*"))


def test_arguments_that_are_places_say_so() -> None:
    """A new flag for a place has a help that names addresses, by which the test above finds it."""
    places = {parameter for _, parameter in PLACES} - {"source", "target"}  # which mean other things elsewhere
    silent = {
        (words, action.dest)
        for words, parser in COMMANDS.items()
        for action in parser._actions
        if action.dest in places and "address" not in (action.help or "") and action.nargs != 0
        if action.type in (None, str)
    }
    assert silent == {(("pull",), "out")}, "a pull writes a folder here"
