"""Settings: each is checked, messages use the user's words, and files are only data."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from residua.capture.hooks.site import FLOATS
from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.pipelines.setup.capture_settings import CaptureSettings, read_config
from residua.store.base.errors import DatasetError, PlanError

NAMES = [field.name for field in fields(CaptureSettings)]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=3)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3))
GOOD: dict[str, Any] = {
    "sites": "resid_post.*,attn_out.3",
    "dtype": "bfloat16",
    "codec": "raw",
    "split": "train",
    "text_column": "text",
    "target_column": "summary",
    "max_target_length": 32,
    "image_column": "picture",
    "image_folder": "pictures",
    "max_image_pixels": 10**6,
    "subset": "en",
    "dataset_revision": "main",
    "min_length": 2,
    "max_tokens": 1000,
    "max_length": 128,
    "long_examples": "truncate",
    "positions": "every:4",
    "drop_special": True,
    "add_special_tokens": False,
    "chat_template": "{{ messages[0].content }}",
    "add_generation_prompt": True,
    "tools": "functions",
    "chat_template_kwargs": {"enable_thinking": False},
    "head": False,
    "batch_tokens": 512,
    "device": "cpu",
    "device_map": "auto",
    "join": True,
    "keep_paths": True,
    "grow": False,
    "tp": 1,
    "gather": False,
    "pp": 1,
    "model_dtype": "float32",
    "attn_implementation": "eager",
    "revision": "v1",
    "seed": 3,
    "rows_per_shard": 1024,
    "host_memory": "1GiB",
    "threads": 2,
}

GENERATED: dict[str, Any] = {
    "generate": 16,
    "prompt_column": "prompt",
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 20,
    "generation_kwargs": {"repetition_penalty": 1.2},
}
"""Settings of generated text, which go with some of the others only."""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "config.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_every_field_can_be_set_and_has_a_help_text() -> None:
    assert set(GOOD) | set(GENERATED) == set(NAMES)
    for values in (GOOD, GENERATED):
        made = CaptureSettings.from_mapping(values)
        assert {name: getattr(made, name) for name in values} == values
    assert all(field.metadata["help"] for field in fields(CaptureSettings))
    assert CaptureSettings.from_mapping({}) == CaptureSettings()


def test_a_key_may_be_written_as_a_flag() -> None:
    assert CaptureSettings.from_mapping({"--max-length": 5, "batch-tokens": 7}) == CaptureSettings(
        max_length=5, batch_tokens=7
    )


def test_the_rules_of_a_plan_have_every_setting_of_the_dataset() -> None:
    rules = CaptureSettings(**GOOD).rules()
    not_of_rows = {"image_folder", "max_image_pixels"}  # where images are, and what is refused
    names = {field.name for field in fields(DatasetSettings)} - {"dataset_revision"} - not_of_rows
    assert set(rules) == {"revision", *names} - set(GENERATED)  # which have a rule of their own
    for name, value in rules.items():
        assert value == GOOD["dataset_revision" if name == "revision" else name]


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), VALUES, max_size=4))
def test_any_mapping_makes_settings_or_a_plain_error(values: dict[str, Any]) -> None:
    try:
        made = CaptureSettings.from_mapping(values)
    except (PlanError, DatasetError) as error:
        assert len(str(error)) < 2000  # noqa: PT017  # either outcome is right for some mappings
        return
    for key, value in values.items():
        found = getattr(made, key.lstrip("-").replace("-", "_"))
        assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [1.5, [], {}, b"x", ["a"], float("nan")])
def test_a_value_of_another_type_is_refused_with_the_type_in_words(name: str, value: object) -> None:
    right = {
        "tools": list,
        "chat_template_kwargs": dict,
        "generation_kwargs": dict,
        "temperature": float,
        "top_p": float,
        "sites": list,
    }
    if isinstance(value, right.get(name, ())):
        pytest.skip("of the right type")
    with pytest.raises(PlanError, match=rf"setting {name} is .*: it should be (str|int|bool|float)( \| \w+)*$"):
        CaptureSettings.from_mapping({name: value})


@pytest.mark.parametrize("name", ["batch_tokens", "max_length", "seed", "threads", "rows_per_shard"])
def test_true_is_not_a_number(name: str) -> None:
    with pytest.raises(PlanError, match="True"):
        CaptureSettings.from_mapping({name: True})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_lenght": 5}, "'max_lenght' is not a setting"),
        ({"max_length": 5, "max-length": 6}, "given twice"),
        ({"dtype": "auto"}, "dtype='auto' "),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"model_dtype": "fp16"}, "model_dtype='fp16' "),
        ({"codec": "zstd"}, "codec='zstd' "),
        ({"batch_tokens": 0}, "batch_tokens=0"),
        ({"threads": -1}, "threads=-1"),
        ({"host_memory": 0}, "host_memory=0"),
        ({"rows_per_shard": 0}, "rows_per_shard=0"),
        ({"rows_per_shard": -2}, "rows_per_shard=-2"),
        ({"rows_per_shard": 1000}, "rows_per_shard=1000"),
        ({"min_length": 0}, "min_length=0"),
        ({"max_length": 4, "min_length": 5}, "min_length=5 is above max_length=4"),
        ({"positions": "first"}, "first"),
        ({"long_examples": "drop"}, "drop"),
    ],
)
def test_a_value_out_of_range_is_refused_in_the_users_words(values: dict[str, Any], words: str) -> None:
    with pytest.raises((PlanError, DatasetError)) as caught:
        CaptureSettings.from_mapping(values)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", FLOATS)
def test_every_float_may_be_stored_and_computed_in(name: str) -> None:
    assert CaptureSettings(dtype=name, model_dtype=name).dtype == name


@pytest.mark.parametrize("dump", [yaml.safe_dump, json.dumps])
def test_a_file_gives_what_was_put_in(tmp_path: Path, dump: Any) -> None:
    values = {name.replace("_", "-"): value for name, value in GOOD.items()}
    found = read_config(write(tmp_path, dump(values)))
    assert found == values
    assert CaptureSettings.from_mapping(found) == CaptureSettings(**GOOD)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch pwned']",
        "sites: !!python/object/apply:pathlib.Path.touch [pwned]",
        "sites: !!python/name:os.system",
        "sites: !!python/object:residua.pipelines.setup.capture_settings.CaptureSettings {}",
        "!!python/tuple [1]",
    ],
)
def test_nothing_in_a_file_is_executed(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError, match=r"config\.yaml is neither YAML nor JSON"):
        read_config(write(tmp_path, text))
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


LAUGHS = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40))])
MERGES = "\n".join(
    ["m0: &m0 {x: 1}", *(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}" for i in range(1, 40))]
)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        MERGES,
        "a: &a [*a]",
        "[" * 30_000,
        "{a: " * 15_000,
        "- " * 30_000,
        "sites: " + "9" * 5000,
        "seed: " + "1:" * 30_000 + "1",
        "seed: 0x" + "f" * 50_000,
        "seed: [0x" + "f" * 50_000 + "]",
        "seed: !!int ''",
        "seed: !!float x",
        "seed: !!bool perhaps",
        "split: 2001-99-99",
        "split: !!timestamp now",
        "split: !!binary '%'",
        "{a: 1",
        "a: b: c",
        "? [a]\n: 1",
        "? {a: 1}\n: 1",
        "a: 1\n---\nb: 1",
        "\t- a",
        b"\xff\xfe\x00",
        b"sites: \x00",
        "%YAML 9.9\n---\na: 1",
    ],
    ids=range(25),
)
def test_a_hostile_file_is_an_error_that_names_file_or_setting(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(PlanError, match=r"config\.yaml|setting (seed|split) is") as caught:
        CaptureSettings.from_mapping(read_config(write(tmp_path, text)))
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("text", ["", "3", "sites", "[sites]", "1: 2", "yes: 1", "null: x", "2001-01-01: x"])
def test_only_a_mapping_of_names_is_settings(tmp_path: Path, text: str) -> None:
    with pytest.raises(PlanError, match=r"config\.yaml .*mapping"):
        read_config(write(tmp_path, text))


@hypothesis_settings(deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet="ab:-?[]{}&*!|>'\"%#\n 019.", max_size=40).map(str.encode))
def test_any_bytes_are_a_mapping_or_a_plan_error(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    path = write(tmp_path_factory.mktemp("config"), text)
    try:
        values = read_config(path)
    except PlanError:
        return
    assert all(isinstance(key, str) for key in values)


def test_a_missing_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"config.* no such file"):
        read_config(tmp_path / "config.yaml")
    with pytest.raises(PlanError, match=r"config.* no such file"):
        read_config(tmp_path)
    with pytest.raises(PlanError, match=r"config\.yaml .* 64 KiB"):
        read_config(write(tmp_path, "#" * 2**16 + "\n"))


def test_sites_are_a_text_or_a_list_of_texts() -> None:
    listed = CaptureSettings.from_mapping({"sites": ["resid_post.*", "z.3,q.3"]})
    assert listed.site_patterns == "resid_post.*,z.3,q.3"
    assert CaptureSettings(sites="z.3").site_patterns == "z.3"
    with pytest.raises(PlanError, match="sites="):
        CaptureSettings.from_mapping({"sites": ["z.3", 4]})
