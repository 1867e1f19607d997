"""Every flag says in its help what happens without it, and says what is true."""

import argparse
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest

from residua.analysis.lens.lens_settings import LensSettings
from residua.pipelines.circuits.circuit_settings import RepeatSettings, SweepSettings
from residua.pipelines.cli.main import _parser
from residua.pipelines.setup.capture_settings import CaptureSettings

OF_SETTINGS: dict[str, list[type[Any]]] = {
    "capture": [CaptureSettings],
    "induction": [CaptureSettings, RepeatSettings],
    "lens train": [LensSettings],
    "patch": [SweepSettings],
    "attribute": [SweepSettings],
}
"""Commands with flags whose default is that of one or more classes of settings; the flags themselves are None."""


def commands(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield every command with its parser."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield name.strip(), parser
    for action in below:
        for word, inner in action.choices.items():
            yield from commands(inner, f"{name} {word}")


COMMANDS = dict(commands(_parser()))


def stated(help_: str) -> str | None:
    """Return the default that a help text states; None if it states none."""
    found = re.search(r"[(;] ?default: (.*)\)", help_, re.DOTALL)
    return found and found[1]


def flags(command: str) -> dict[str, argparse.Action]:
    """Return the flags of a command that need a default, by name."""
    parser = COMMANDS[command]
    one_of = [
        action for group in parser._mutually_exclusive_groups if group.required for action in group._group_actions
    ]
    return {
        action.option_strings[0]: action
        for action in parser._actions
        if action.option_strings and not action.required and action.dest != "help" and action not in one_of
    }


def test_all_commands_are_walked() -> None:
    assert {"capture", "info", "verify", "probe", "top", "lens train", "lens show", "patch"} <= COMMANDS.keys()
    assert len(COMMANDS) >= 22


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_states_its_default(command: str) -> None:
    required = [flag for flag, action in flags(command).items() if "(required)" in str(action.help)]
    assert required == (["--model", "--dataset", "--out"] if command == "capture" else [])
    missing = [flag for flag, action in flags(command).items() if stated(str(action.help)) is None]
    assert missing == required


@pytest.mark.parametrize("command", COMMANDS)
def test_the_stated_default_is_the_real_one(command: str) -> None:
    of_class = {field.name: field.default for settings in OF_SETTINGS.get(command, []) for field in fields(settings)}
    for flag, action in flags(command).items():
        real = of_class.get(action.dest) if action.default is None else action.default
        said = stated(str(action.help))
        if isinstance(real, bool) and len(action.option_strings) == 1:
            assert said not in (None, "on"), flag  # off, or in words what happens then
        elif isinstance(real, bool):
            assert said == ("on" if real else "off"), flag
        elif real not in (None, []):
            assert said == str(real), flag


@pytest.mark.parametrize("command", COMMANDS)
def test_a_help_text_is_a_phrase(command: str) -> None:
    described = str(COMMANDS[command].description)
    assert described[0].isupper()
    assert described.endswith(".")
    for action in COMMANDS[command]._actions:
        text = str(action.help)
        assert not text.endswith("."), text
        assert "%" not in text, text
