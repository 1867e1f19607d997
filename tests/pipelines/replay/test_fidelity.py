"""Fidelity against a plain hook that puts the rounded rows in, with divergences computed in float64."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import residua
from residua.pipelines.cli.main import main
from residua.store.base.errors import DamagedArchiveError, PlanError
from residua.store.read.archive import Archive
from residua.store.read.summary import summarise
from residua.store.verification.verify import verify
from tests.capture.replay_samples import EVEN, LAST, LENGTHS, PADDED, captured, model_of, run_in_full, stored
from tests.ragged import MODEL, capture_words, write_dataset

N_TOKENS = sum(LENGTHS)


def divergences(archive: Archive, layer: int) -> tuple[list[float], int]:
    """Return the KL of each token, and how many have the same top 1, with stored rows put in after a block."""
    found, same = list[float](), 0
    for examples in (EVEN, PADDED, LAST):
        model = model_of("llama")
        plain, mask = run_in_full(model, archive, examples)

        def put_in(_module: object, _inputs: object, output: torch.Tensor, batch: list[int] = examples) -> torch.Tensor:
            new = output.clone()
            for place, example in enumerate(batch):
                rows = stored(archive, f"resid_post.{layer}", example)
                new[place, : len(rows)] = rows
            return new

        handle = model.get_submodule(f"model.layers.{layer}").register_forward_hook(put_in)
        rounded, _ = run_in_full(model, archive, examples)
        handle.remove()
        log_p, log_q = plain[mask].double().log_softmax(-1), rounded[mask].double().log_softmax(-1)
        found += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
        same += int((plain[mask].argmax(-1) == rounded[mask].argmax(-1)).sum())
    return found, same


@pytest.mark.parametrize("options", [{"codec": "int8-block32"}, {"dtype": "bfloat16"}])
def test_figures_are_those_of_plain_hooks(options: dict[str, str], tmp_path: Path) -> None:
    archive = captured(model_of("llama"), tmp_path / "a", sites="resid_post.0,resid_post.1,z.1", **options)
    digest = archive.plan.digest
    found = residua.fidelity(model_of("llama"), archive.path, n_batches=99)
    assert (found.n_examples, found.n_tokens) == (5, N_TOKENS)
    assert list(found.sites) == ["resid_post.0", "resid_post.1"]
    for layer in (0, 1):
        expected, same = divergences(archive, layer)
        site = found.sites[f"resid_post.{layer}"]
        assert np.mean(expected) > 1e-6, "rounding has an effect"
        assert site.kl_mean == pytest.approx(np.mean(expected), rel=0.02)
        assert site.kl_max == pytest.approx(max(expected), rel=0.02)
        assert site.top1_agreement == pytest.approx(same / N_TOKENS)
    assert {site.name: site.fidelity for site in summarise(Archive(archive.path)).sites} == {**found.sites, "z.1": None}
    report = verify(archive.path)
    assert (report.problems, report.notes) == ([], [])
    assert Archive(archive.path).plan.digest == digest


def test_what_cannot_be_measured_or_trusted_is_refused(tmp_path: Path) -> None:
    model = model_of("llama")
    exact = captured(model, tmp_path / "exact", sites="resid_post.1,z.1")
    with pytest.raises(PlanError, match=r"rounded.*resid_post\.1"):
        residua.fidelity(model, exact.path)
    lossy = captured(model, tmp_path / "lossy", sites="resid_post.1", codec="bitround7")
    with pytest.raises(PlanError, match=re.escape(str(lossy.path))):
        residua.fidelity(model_of("gpt2"), lossy.path)
    residua.fidelity(model, lossy.path, n_batches=1)
    file = lossy.path / "fidelity.json"
    (exact.path / "fidelity.json").write_bytes(file.read_bytes())
    with pytest.raises(PlanError, match=r"fidelity\.json.* another archive"):
        summarise(exact)
    file.write_text(file.read_text().replace('"kl_max": ', '"kl_max": 1'))
    with pytest.raises(DamagedArchiveError, match=r"fidelity\.json.*SHA-256"):
        summarise(lossy)
    (problem,) = verify(lossy.path).problems
    assert problem.path == "fidelity.json"
    file.write_text(json.dumps({"fidelity": 3}))
    with pytest.raises(DamagedArchiveError, match=r"fidelity\.json"):
        summarise(lossy)


def test_info_shows_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.zarr"
    dataset = write_dataset(tmp_path / "d.jsonl", 4)
    assert main(capture_words(dataset, out, "--sites", "resid_post.2", "--codec", "int8-block32")) == 0
    assert main(["fidelity", str(out), "--model", str(MODEL), "--batches", "2"]) == 0
    printed = capsys.readouterr().out
    (line,) = [line.split() for line in printed.splitlines() if line.lstrip().startswith("resid_post.2")]
    assert 0 < float(line[1]) <= float(line[2])
    assert main(["info", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "mean KL" in shown
    assert f"{float(line[1]):.1e}" in shown


@pytest.mark.parametrize(
    ("kind", "counted", "said"),
    [
        ("BertForMaskedLM", "tokens", "not those of the next token"),
        ("BertForSequenceClassification", "nats an example", "an example as a whole"),
    ],
)
def test_what_diverges_is_said_of_models_that_predict_no_next_token(
    kind: str, counted: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = getattr(transformers, kind)(config).eval()
    model.save_pretrained(tmp_path / "model")
    ids = [[1, 5, 9, 2], [1, 30, 2], [1, 7, 8, 11, 40, 2]]
    options: dict[str, Any] = {"sites": "resid_post.0", "codec": "int8-block32", "out": tmp_path / "a.zarr"}
    residua.capture_dataset(str(tmp_path / "model"), ids, **options)
    capsys.readouterr()
    assert main(["fidelity", str(tmp_path / "a.zarr"), "--model", str(tmp_path / "model")]) == 0
    shown = capsys.readouterr().out
    assert counted in shown.splitlines()[0]
    assert said in shown
