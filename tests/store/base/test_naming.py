"""Messages name a setting as the caller gave it."""

import threading
from pathlib import Path
from typing import Any

import pytest

from residua.pipelines.cli.main import main
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.store.base.errors import ResiduaError
from residua.store.base.naming import named, naming_flags


@pytest.mark.parametrize(
    ("name", "value", "in_python", "as_flag"),
    [
        ("max_length", (), "max_length=", "--max-length"),
        ("host_memory", (1000,), "host_memory=1000", "--host-memory 1000"),
        ("split", ("train",), "split='train'", "--split train"),
        ("split", ("a b",), "split='a b'", "--split 'a b'"),
        ("out", (Path("a/b.zarr"),), "out='a/b.zarr'", "--out a/b.zarr"),
        ("head", (False,), "head=False", "--no-head"),
        ("drop_special", (True,), "drop_special=True", "--drop-special"),
        ("captured_from", ("qk",), "captured_from='qk'", "--from qk"),
    ],
)
def test_a_setting_in_both_worlds(name: str, value: tuple[Any, ...], in_python: str, as_flag: str) -> None:
    assert named(name, *value) == in_python
    with naming_flags():
        assert named(name, *value) == as_flag
    assert named(name, *value) == in_python


def test_a_long_value_is_cut() -> None:
    assert len(named("chat_template", "x" * 10_000)) < 300


@pytest.mark.parametrize(
    "options", [{"max_length": 0}, {"codec": "zip"}, {"rows_per_shard": 3}, {"long_examples": "x"}, {"threads": 0}]
)
def test_a_refusal_speaks_the_callers_language(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    [(name, value)] = options.items()
    with pytest.raises(ResiduaError, match=f"{name}={value!r}"):
        CaptureSettings(**options)
    flag = "--" + name.replace("_", "-")
    words = ["capture", "--model", "m", "--dataset", "d", "--out", "o", flag, str(value)]
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert f"{flag} {value}" in shown
    assert f"{name}=" not in shown
    with pytest.raises(ResiduaError, match=f"{name}={value!r}"):  # the command line has not changed Python's
        CaptureSettings(**options)


def test_other_threads_are_left_alone() -> None:
    found = []
    with naming_flags():
        thread = threading.Thread(target=lambda: found.append(named("out")))
        thread.start()
        thread.join()
    assert found == ["out="]
