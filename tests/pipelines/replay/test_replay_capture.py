"""Capture of what follows a replay: against plain hooks, and bit for bit if nothing is edited."""

import hashlib
import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor
from transformers import PreTrainedModel

import residua
from residua.capture.replay.engine import Replayer
from residua.pipelines.cli.main import main
from residua.pipelines.replay.capture import ReplayCapture
from residua.store.base.errors import PlanError, UnknownSiteError
from residua.store.format.archive_metadata import is_archive
from residua.store.read.archive import Archive
from residua.store.storage.destination import DiskFolder
from residua.store.verification.verify import verify
from tests.calls import count_calls
from tests.capture.replay_samples import EVEN, LAST, LENGTHS, MODELS, PADDED, captured, model_of, run_in_full, tokens
from tests.forking import Forks
from tests.ragged import MODEL, capture_words, write_dataset
from tests.stopped import content

HALVE = {"edit": "scale", "site": "mlp_out.1", "by": 0.5, "positions": "2:"}
PUSH = {"edit": "add", "site": "resid_post.1", "vector": [float(i % 3) for i in range(32)], "examples": [1, 2, 3]}
LATER = "mlp_out.1,resid_post.1,z.2,resid_post.2,final,logits"


def replayed(model: PreTrainedModel, archive: Archive, out: Path, **options: Any) -> Archive:
    """Return the archive of what follows."""
    found = residua.replay_dataset(model, archive, out=out, **{"at": "resid_post.0", "capture": LATER, **options})
    assert found.archive is not None
    assert found.archive.path == out / "acts.zarr"
    return found.archive


def assert_equal_bits(found: Archive, expected: Archive) -> None:
    for site in found.sites:
        there = expected[site].torch(slice(0, expected.n_rows))
        assert torch.equal(found[site].torch(slice(0, found.n_rows)), there), site


@pytest.mark.parametrize("name", [name for name in MODELS if name != "roberta"])
def test_without_edits_every_later_site_has_the_captured_bits(name: str, tmp_path: Path) -> None:
    model = model_of(name, torch.bfloat16 if name == "qwen3" else torch.float32)
    later = "resid_post.1,resid_pre.2,resid_post.2,final,logits" + ",z.2,k.2" * (name not in ("gptj", "bloom"))
    archive = captured(model, tmp_path / "a", sites=f"resid_post.0,{later}", rows_per_shard=16)
    found = replayed(model, archive, tmp_path / "out", capture=later)
    assert found.sites == archive.sites[1:]
    assert_equal_bits(found, archive)
    assert found.plan.rows_per_shard == 16


def test_captured_positions_stay_the_same(tmp_path: Path) -> None:
    model = model_of("llama")
    archive = captured(model, tmp_path / "a", positions="every:3")
    found = replayed(model, archive, tmp_path / "out", capture="resid_post.2,final")
    assert found.n_rows == archive.n_rows < sum(LENGTHS)
    assert_equal_bits(found, archive)


def by_hand(model: PreTrainedModel, archive: Archive, examples: list[int]) -> dict[str, Tensor]:
    """Return each site of a batch under the two edits, (tokens, *row), by hooks on the modules."""
    kept: dict[str, Tensor] = {}
    vector = torch.tensor([float(i % 3) for i in range(32)])
    pushed = torch.tensor([[[float(example in (1, 2, 3))]] for example in examples])

    def halve(_module: object, _inputs: object, output: Tensor) -> Tensor:
        kept["mlp_out.1"] = torch.cat([output[:, :2], output[:, 2:] * 0.5], 1)
        return kept["mlp_out.1"]

    def push(_module: object, _inputs: object, output: Tensor) -> Tensor:
        kept["resid_post.1"] = output + pushed * vector
        return kept["resid_post.1"]

    def keep_last(_module: object, _inputs: object, output: Tensor) -> None:
        kept["resid_post.2"] = kept["final"] = output

    def keep_heads(_module: object, inputs: tuple[Tensor]) -> None:
        kept["z.2"] = inputs[0].view(*inputs[0].shape[:2], 4, -1)

    handles = [
        model.get_submodule("model.layers.1.mlp").register_forward_hook(halve),
        model.get_submodule("model.layers.1").register_forward_hook(push),
        model.get_submodule("model.layers.2").register_forward_hook(keep_last),
        model.get_submodule("model.layers.2.self_attn.o_proj").register_forward_pre_hook(keep_heads),
    ]
    kept["logits"], mask = run_in_full(model, archive, examples)
    for handle in handles:
        handle.remove()
    return {site: tensor[mask] for site, tensor in kept.items()}


@pytest.mark.parametrize("at", ["resid_post.0", None])
def test_edited_rows_are_those_of_plain_hooks(at: str | None, tmp_path: Path) -> None:
    model = model_of("llama")
    archive = captured(model, tmp_path / "a")
    found = replayed(model, archive, tmp_path / "out", at=at, edits=[HALVE, PUSH])
    for examples in (EVEN, PADDED, LAST):
        expected = by_hand(model_of("llama"), archive, examples)
        rows = np.concatenate([np.arange(*found.example_table.rows(example)) for example in examples])
        for site in found.sites:
            assert torch.equal(found[site].torch(rows), expected[site]), site
    plain = zarr.open_array(found.path / "sites/resid_post/2", mode="r")[:]
    np.testing.assert_array_equal(plain, found["resid_post.2"][:])
    moved = np.abs(np.asarray(plain) - archive["resid_post.2"][:]).max(-1)
    assert (moved[:2] == 0).all()
    assert moved[2:42].min() > 0


@pytest.mark.parametrize("choice", [{"examples": [1, 3]}, {"rows": [12, 40]}, {"where": 'label == "b"'}])
def test_chosen_examples_keep_their_columns_and_numbers(choice: dict[str, Any], tmp_path: Path) -> None:
    archive = captured(model_of("llama"), tmp_path / "a")
    found = replayed(model_of("llama"), archive, tmp_path / "out", edits=[HALVE, PUSH], **choice)
    table = found.examples.to_pandas()
    assert table["replayed_example"].tolist() == [1, 3]
    assert table["label"].tolist() == ["b", "b"]
    assert [ids.tolist() for ids in table["input_ids"]] == [tokens()[1], tokens()[3]]
    assert found.rows.example[:].tolist() == [0] * 12 + [1] * 11
    expected = by_hand(model_of("llama"), archive, [1, 3])
    for site in found.sites:  # rows that went in were computed in other batches
        torch.testing.assert_close(found[site].torch(slice(0, 23)), expected[site], rtol=1e-5, atol=1e-5)


def test_the_archive_records_the_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of("llama")
    archive = captured(model, tmp_path / "a")
    found = replayed(model, archive, tmp_path / "out", edits=[HALVE])
    assert found.is_sealed
    report = verify(found.path)
    assert (report.problems, report.notes) == ([], [])
    said: Any = found.provenance["replay"]
    assert said["archive"] == archive.plan.digest
    assert (said["at"], said["reproducible"]) == (["resid_post.0"], True)
    assert said["edits"] == [{**HALVE, "site": ["mlp_out.1"]}]
    named = {name: said[name] for name in ("archive", "at", "edits", "contents")}
    canonical = json.dumps(named, sort_keys=True, separators=(",", ":")).encode()
    assert found.plan.rules["replay"] == hashlib.sha256(canonical).hexdigest()
    other = replayed(model, archive, tmp_path / "other", edits=[{**HALVE, "tokens": list(range(97))}])
    assert other.plan.digest != found.plan.digest
    assert main(["info", str(other.path)]) == 0
    shown = capsys.readouterr().out
    assert "  replay\n    archive: " in shown
    assert "--json has them" in shown, "an edit may be as long as a row"
    assert max(map(len, shown.splitlines())) < 500
    by_function = replayed(
        model, archive, tmp_path / "f", edits=[{"edit": "function", "site": "z.2", "function": _same}]
    )
    said = by_function.provenance["replay"]
    assert said["reproducible"] is False
    for job in (residua.reproduce, residua.fidelity):
        with pytest.raises(PlanError, match=rf"{re.escape(str(found.path))}.* replay"):
            job(model, found.path)


def _same(_site: str, rows: Tensor) -> Tensor:
    return rows


def test_its_rows_can_be_replayed_again(tmp_path: Path) -> None:
    model = model_of("llama")
    archive = captured(model, tmp_path / "a")
    found = replayed(model, archive, tmp_path / "out", edits=[HALVE, PUSH], examples=[0, 1, 3])
    with residua.replay(model, found, examples=EVEN, at="resid_post.1") as run:
        for example in EVEN:
            rows = slice(*found.example_table.rows(example))
            assert torch.equal(run.logits[example], found["logits"].torch(rows))
        assert f"{found.path} holds" in run.notes[0]
    again = replayed(model, found, tmp_path / "again", at="resid_post.1", capture="final", examples=[1, 2])
    assert again.examples["replayed_example"].to_pylist() == [1, 2]


def test_patterns_are_those_of_the_edited_run(tmp_path: Path) -> None:
    model = model_of("llama")
    model.set_attn_implementation("eager")
    archive = captured(model, tmp_path / "a")
    found = replayed(model, archive, tmp_path / "out", edits=[HALVE], capture="pattern.2")

    def halve(_module: object, _inputs: object, output: Tensor) -> Tensor:
        return torch.cat([output[:, :2], output[:, 2:] * 0.5], 1)

    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp").register_forward_hook(halve)
        attentions = model(input_ids=torch.tensor([tokens()[4]]), output_attentions=True).attentions
    stored = found["pattern.2"].torch(slice(*found.example_table.rows(4)))
    torch.testing.assert_close(stored[..., :3], attentions[2][0].transpose(0, 1))
    assert stored[..., 3:].abs().max() == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_an_edited_pattern_means_eager_attention_for_every_batch(name: str, tmp_path: Path) -> None:
    """Also for the batches without an edited token, as in `replay`."""
    model = model_of(name)
    archive = captured(model, tmp_path / "a")
    edit = {"edit": "zero", "site": "pattern.1", "heads": [0], "examples": LAST}
    found = replayed(model, archive, tmp_path / "out", at=None, edits=[edit], capture="logits")
    with residua.replay(model, archive, examples=PADDED, edits=[edit]) as run:
        replayed_logits = run.logits
    fast, is_token = run_in_full(model, archive, PADDED)
    model.set_attn_implementation("eager")
    eager, _ = run_in_full(model, archive, PADDED)
    assert not torch.equal(fast[is_token], eager[is_token]), "the implementations do not differ here: no test"
    for place, example in enumerate(PADDED):
        expected = eager[place][is_token[place]]
        assert torch.equal(found["logits"].torch(slice(*found.example_table.rows(example))), expected)
        assert torch.equal(replayed_logits[place], expected)


def test_edits_above_the_last_captured_site_do_not_matter(tmp_path: Path) -> None:
    model = model_of("llama")
    archive = captured(model, tmp_path / "a")
    edits = [HALVE, {"edit": "zero", "site": "resid_post.2"}, {"edit": "scale", "site": "logits", "by": 2.0}]
    found = replayed(model, archive, tmp_path / "out", edits=edits, capture="resid_post.1")
    whole = replayed(model, archive, tmp_path / "whole", edits=edits, capture="resid_post.1,final,logits")
    assert_equal_bits(found, whole)
    assert float(whole["final"].torch(slice(0, 45)).abs().max()) == 0


def test_what_cannot_be_captured_is_refused_before_anything_runs(tmp_path: Path) -> None:
    model = model_of("llama")
    archive = captured(model, tmp_path / "a")
    calls: list[int] = []
    count_calls(model, calls)
    for capture, error, message in (
        ("resid_post.*", PlanError, r"capture='resid_post\.0'.*resid_post\.1"),
        ("attn_out.1", PlanError, r"capture='attn_out\.1'.*resid_post\.1"),
        ("resid_post.9", UnknownSiteError, "resid_post.9"),
        ("", UnknownSiteError, "(?i)no site"),
    ):
        with pytest.raises(error, match=message):
            replayed(model, archive, tmp_path / "out", at="resid_post.1", capture=capture)
    assert not calls
    assert not (tmp_path / "out").exists()
    replayed(model, archive, tmp_path / "out", capture="final")
    with pytest.raises(PlanError, match=r"another plan:\n  sites\.final: "):
        replayed(model, archive, tmp_path / "out", capture="logits")
    named = [{"input_ids": [3, 4, 5], "replayed_example": "mine"}]
    theirs = residua.capture_dataset(model, named, out=tmp_path / "b", sites="resid_post.0").archive
    with pytest.raises(PlanError, match="column 'replayed_example'"):
        replayed(model, theirs, tmp_path / "c", capture="final")


def test_wider_rows_have_lower_shards(tmp_path: Path) -> None:
    model = model_of("llama")
    archive = captured(model, tmp_path / "a")
    replayer = Replayer(model, archive, at=["resid_post.0"])
    examples = np.arange(len(archive.example_table))
    facts: dict[str, Any] = {"replay": {}, "facts": {"command": None}}
    job = ReplayCapture(replayer, "logits", examples, DiskFolder(tmp_path / "acts.zarr"), host_memory=32_000, **facts)
    found = job.capture(None)
    replayer.rows.close()
    assert found.plan.rows_per_shard == 32
    assert "holds 32 rows and not 64" in job.notes[-1]
    rows = slice(0, archive.n_rows)
    torch.testing.assert_close(found["logits"].torch(rows), archive["logits"].torch(rows), rtol=1e-5, atol=1e-5)
    with pytest.raises(PlanError, match=r"12 rows of 388 bytes, .* 1,000 bytes"):
        ReplayCapture(replayer, "logits", examples, DiskFolder(tmp_path / "small"), host_memory=1000, **facts)


def test_killed_at_many_steps_it_ends_the_same(forks: Forks, tmp_path: Path) -> None:
    archive, reference, killed = tmp_path / "acts.zarr", tmp_path / "reference", tmp_path / "killed"
    dataset = write_dataset(tmp_path / "ragged.jsonl", 12)
    assert forks.run(capture_words(dataset, archive, "--sites", "resid_post.3")).code == 0
    (tmp_path / "edits.yaml").write_text("[{edit: zero, site: attn_out.4, positions: '1:'}]")
    job = ["replay", str(archive), "--model", str(MODEL), "--edit", str(tmp_path / "edits.yaml")]
    words = [*job, "--at", "resid_post.3", "--examples", "1-9,11", "--out"]
    capture = ["--capture", "resid_post.4,final,q.5"]
    assert forks.run([*words, reference, *capture]).code == 0
    assert forks.run([*words, killed]).code == 0  # the archive may be asked for later
    n_left = [0]
    for die_at in (5, 70, 220, 90, 150):
        ended = forks.run([*words, killed, *capture], die_at=die_at)
        assert ended.code == -signal.SIGKILL, ended.output
        if is_archive(killed / "acts.zarr"):
            assert verify(killed / "acts.zarr").problems == []
            n_left.append(len(list((killed / "acts.zarr/commits").glob("*.json"))))
    ended = forks.run([*words, killed, *capture, "--json"])
    assert ended.code == 0, ended.output
    assert str(killed / "acts.zarr") in ended.output
    n_shards = len(list((killed / "acts.zarr/commits").glob("*.json")))
    assert n_left == sorted(n_left)
    assert 0 < n_left[-1] < n_shards
    assert content(killed / "acts.zarr") == content(reference / "acts.zarr")
    assert verify(killed / "acts.zarr").problems == []
    ours, theirs = (dict(Archive(folder / "acts.zarr").provenance) for folder in (killed, reference))
    assert {**ours, "command": ""} == {**theirs, "command": ""}
    assert sorted(path.name for path in killed.iterdir()) == ["acts.zarr", "examples", "residua.json", "tokens"]


def test_sites_are_stored_as_those_of_the_archive_unless_told(tmp_path: Path) -> None:
    model = model_of("llama")
    archive = captured(model, tmp_path / "a", dtype="float16", codec="fast")
    edits = [{"edit": "scale", "site": "attn_out.1", "by": 0.5}]
    asked: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
        "own": ({}, ("float16", "fast")),
        "other": ({"dtype": "float32", "codec": "raw"}, ("float32", "raw")),
    }
    for name, (options, expected) in asked.items():
        out = tmp_path / name
        following = residua.replay_dataset(
            model, archive, out=out, edits=edits, capture="resid_post.2", examples=[0, 1], **options
        ).archive
        assert following is not None
        assert {(site.dtype, site.codec) for site in following.plan.sites} == {expected}
    with pytest.raises(PlanError, match="capture"):
        residua.replay_dataset(model, archive, out=tmp_path / "x", edits=edits, codec="raw")
    with pytest.raises(PlanError, match="float7"):
        residua.replay_dataset(model, archive, out=tmp_path / "x", edits=edits, capture="final", dtype="float7")
