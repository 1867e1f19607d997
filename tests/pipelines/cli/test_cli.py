"""The command line as a user types it: what it prints, its exit codes, and messages that quote the user's words."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM, PreTrainedModel

import residua
from residua.pipelines.cli.main import main
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.store.read.archive import Archive
from tests.forking import ENVIRONMENT
from tests.models.tiny import ODD
from tests.models.tiny_pairs import TINY_PAIRS
from tests.models.tiny_vision import VISION
from tests.ragged import MODEL, capture_words, write_dataset
from tests.stopped import take_back

SITES = ("--sites", "resid_post.1,q.3")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "ragged.jsonl", 6, seed=3)


@pytest.fixture(scope="module")
def archive(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("archive") / "a.zarr"
    residua.capture_dataset(str(MODEL), str(dataset), out=out, sites=SITES[1], rows_per_shard=32)
    return out


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """Restore this process's SIGTERM handler, which a capture changes."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def answer(capsys: pytest.CaptureFixture[str], *words: str | Path, code: int = 0) -> Any:
    """Run the command line with ``--json``; return the one object that it prints."""
    assert main([*(str(word) for word in words), "--json"]) == code
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    return json.loads(printed)


def complaint(capsys: pytest.CaptureFixture[str], *words: str | Path, code: int = 2) -> str:
    """Run a command line that fails; return its message, which is on standard error alone."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err


def test_capture_prints_figures_for_people(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.zarr"
    assert main(capture_words(dataset, out, *SITES)) == 0
    n_rows = Archive(out).n_rows
    printed = capsys.readouterr().out
    assert f"captured  2 sites of {n_rows:,} rows (6 examples)" in printed
    assert "tokens/s" in printed
    assert "bytes a token" in printed
    assert str(out) in printed
    assert main(capture_words(dataset, out, *SITES)) == 0
    assert "nothing was missing" in capsys.readouterr().out


def test_capture_prints_one_object_for_machines(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.zarr"
    found = answer(capsys, *capture_words(dataset, out, *SITES))
    archive = Archive(out)
    assert found["archive"]["rows"] == found["run"]["rows"] == archive.n_rows
    assert [site["name"] for site in found["archive"]["sites"]] == list(archive.sites)
    assert found["run"]["resumed"] is False


def test_info(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "info", archive)
    assert found["sealed"] is True
    assert found["rows"] == Archive(archive).n_rows
    assert found["columns"] == list(Archive(archive).example_table.column_types())
    assert found["stored_bytes"] == sum(path.stat().st_size for path in archive.glob("*/**/c/**/*") if path.is_file())
    assert found["provenance"]["packages"]["torch"] == torch.__version__
    assert main(["info", str(archive)]) == 0
    printed = capsys.readouterr().out
    assert "(sealed)" in printed
    for word in ("source_index", "resid_post.1", "q.3", "4 x 32", "float32", "fast", torch.__version__):
        assert word in printed


def test_info_of_an_unsealed_archive_shows_progress(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(archive, tmp_path / "a.zarr")
    n_rows = Archive(out).n_rows
    take_back(out, 1)
    found = answer(capsys, "info", out)
    assert (found["sealed"], found["rows"], found["total_rows"]) == (False, n_rows - 32, n_rows)
    assert main(["info", str(out)]) == 0
    assert f"not sealed: {n_rows - 32:,} of {n_rows:,} rows are captured" in capsys.readouterr().out
    assert main(["verify", str(out)]) == 0
    assert "not sealed" in capsys.readouterr().out


def test_verify(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "verify", archive)
    assert found["sound"] is True
    assert found["problems"] == []
    assert found["n_chunks"] == 5 * len(Archive(archive).commits)
    assert main(["verify", str(archive)]) == 0
    assert capsys.readouterr().out.startswith("sound: ")


def test_verify_names_what_is_damaged(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shutil.copytree(archive, tmp_path / "a.zarr")
    names = ["sites/q/3/c/1/0/0", "head/head.json"]
    for name in names:
        data = bytearray((out / name).read_bytes())
        data[len(data) // 2] ^= 4
        (out / name).write_bytes(data)
    found = answer(capsys, "verify", out, code=1)
    assert found["sound"] is False
    assert {problem["path"] for problem in found["problems"]} == set(names)
    assert main(["verify", str(out)]) == 1
    printed = capsys.readouterr().out
    assert all(f"damaged: {name}" in printed for name in names)


def test_sites(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "sites", "--model", MODEL)
    assert found["resid_post.5"]["row_shape"] == [128]
    assert found["k.0"]["row_shape"] == [2, 32]
    assert main(["sites", "--model", str(MODEL)]) == 0
    printed = capsys.readouterr().out
    assert "resid_post.5" in printed
    assert "2 x 32" in printed
    assert "attn_out too" not in printed


def test_sites_of_an_architecture_that_is_not_in_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ODD["olmo2"]().save_pretrained(tmp_path)
    assert main(["sites", "--model", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "resid_post.2" in printed
    assert "olmo2" in printed
    assert "--weights" in printed


@pytest.mark.parametrize("make", [ODD["olmo2"], TINY_PAIRS["t5"], VISION["vit"]])
def test_weights_show_the_sites_that_the_loaded_model_has(
    make: Callable[[], PreTrainedModel], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    found = answer(capsys, "sites", "--model", tmp_path, "--weights")
    assert list(found) == list(residua.model_sites(model))
    assert any("attn_out.1" in name for name in found)
    assert main(["sites", "--model", str(tmp_path), "--weights"]) == 0
    assert "note:" not in capsys.readouterr().out


def test_a_configuration_without_a_class_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    hf.LlamaConfig().save_pretrained(tmp_path)
    assert main(["sites", "--model", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path) in said
    assert "architectures" in said


@pytest.mark.parametrize(
    ("words", "quoted"),
    [
        (["--sites", "resid_pots.1"], "resid_pots.1"),
        (["--sites", "resid_post.99"], "resid_post.99"),
        (["--codec", "zip"], "zip"),
        (["--dtype", "float7"], "float7"),
        (["--device", "abacus"], "abacus"),
        (["--model", "no/such/model/here"], "no/such/model/here"),
        (["--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--text-column", "prose"], "prose"),
        (["--split", "exam"], "exam"),
        (["--positions", "some"], "some"),
        (["--positions", "column:wanted"], "wanted"),
        (["--rows-per-shard", "33"], "33"),
        (["--batch-tokens", "0"], "0"),
        (["--max-length", "-5"], "-5"),
        (["--long-examples", "burn"], "burn"),
        (["--attn-implementation", "attentive"], "attentive"),
        (["--config", "nothing.yaml"], "nothing.yaml"),
    ],
)
def test_bad_words_are_quoted(
    words: list[str], quoted: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.zarr"
    message = complaint(capsys, *capture_words(dataset, out, *SITES), *words)
    assert quoted in message
    assert list(tmp_path.iterdir()) == []


def test_errors_are_one_object_for_machines(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, *capture_words(dataset, tmp_path / "a.zarr", "--sites", "resid_pots.1"), code=2)
    assert found["error"] == "UnknownSiteError"
    assert "resid_pots.1" in found["message"]
    found = answer(capsys, "info", tmp_path / "none.zarr", code=2)
    assert str(tmp_path / "none.zarr") in found["message"]
    found = answer(capsys, "capture", "--model", MODEL, code=2)
    assert "--dataset and --out" in found["message"]


def test_another_plan_is_refused(
    archive: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = complaint(capsys, *capture_words(dataset, archive, "--sites", "resid_post.2"))
    assert str(archive) in message
    assert "sites.resid_post.1" in message
    assert Archive(archive).is_sealed


def test_a_folder_that_is_not_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for job in ("info", "verify"):
        assert str(tmp_path / "none.zarr") in complaint(capsys, job, tmp_path / "none.zarr")


def test_a_damaged_archive_is_exit_code_1(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.zarr").mkdir()
    text = (archive / "zarr.json").read_text().replace('"seed": 0', '"seed": 1')
    (tmp_path / "a.zarr" / "zarr.json").write_text(text)
    assert str(tmp_path / "a.zarr" / "zarr.json") in complaint(capsys, "info", tmp_path / "a.zarr", code=1)


def test_flags_win_over_the_config(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = tmp_path / "settings.yaml", tmp_path / "a.zarr"
    config.write_text(
        f"model: {MODEL}\ndataset: {dataset}\nsites: resid_post.0\nrows-per-shard: 64\ndtype: bfloat16\n"
        "drop_special: true\n"
    )
    assert main(["capture", "--config", str(config), "--out", str(out), "--sites", "resid_post.4"]) == 0
    plan = Archive(out).plan
    assert Archive(out).sites == ("resid_post.4",)
    assert plan.rows_per_shard == 64
    assert plan.sites[0].dtype == "bfloat16"
    assert plan.rules["drop_special"] is True


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("sitse: embed", "sitse"),
        ("batch_tokens: many", "many"),
        ("- a list", "mapping"),
        ("a: [", "neither YAML nor JSON"),
        ("!!python/object/apply:os.system ['touch hacked']", "neither YAML nor JSON"),
        ("batch_tokens: true", "batch_tokens"),
        ("1: 2", "mapping"),
        ("model: 5", "--model"),
    ],
)
def test_a_bad_config_is_quoted(
    text: str, quoted: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text(text)
    words: list[str | Path] = ["capture", "--config", config, "--dataset", dataset, "--out", tmp_path / "a.zarr"]
    words += [] if "model" in text else ["--model", MODEL]
    message = complaint(capsys, *words)
    assert quoted in message
    assert list(tmp_path.iterdir()) == [config]


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["capture", "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for name in ("model", "dataset", "out", "config", "json", *(field.name for field in fields(CaptureSettings))):
        assert f"--{name.replace('_', '-')} " in printed.replace("\n", " ").replace("]", " ")


@pytest.mark.parametrize("words", [[], ["captrue"], ["capture", "--sitse", "embed"], ["info"]])
def test_unknown_jobs_and_flags_show_the_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage: residua" in capsys.readouterr().err


def test_the_module_is_the_command(archive: Path) -> None:
    command = Path(sys.executable).parent / "residua"
    outputs = [
        subprocess.run(
            [*words, "info", str(archive), "--json"], env=ENVIRONMENT, capture_output=True, timeout=60, check=True
        ).stdout
        for words in ([str(command)], [sys.executable, "-m", "residua"])
    ]
    assert outputs[0] == outputs[1]
    assert json.loads(outputs[0])["sealed"] is True


def test_nan_is_a_warning(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[5] = torch.nan
    model.save_pretrained(broken)
    words = [word if word != str(MODEL) else str(broken) for word in capture_words(dataset, tmp_path / "a.zarr")]
    assert main([*words, "--sites", "resid_post.1-2"]) == 0
    n_rows = Archive(tmp_path / "a.zarr").n_rows
    assert f"warning: NaN or infinite values, kept as they are: resid_post.2 {n_rows:,}" in capsys.readouterr().out
