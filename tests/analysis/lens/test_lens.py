"""A lens on a small archive: its report recomputed, never worse than the logit lens, refusals, printed output."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

import residua
from residua.analysis.lens.lens import TunedLens
from residua.analysis.lens.lens_settings import LensSettings
from residua.analysis.lens.rows import layer_of, lens_points
from residua.analysis.lens.train import LensTraining
from residua.store.base.errors import AnalysisError, DamagedArchiveError
from residua.store.read.archive import Archive
from tests.analysis.lens_archive import held_out_rows, make_lens_archive

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def lens(lens_archive: Archive) -> TunedLens:
    return TunedLens.fit(lens_archive, epochs=3)


def test_the_report_is_what_the_definition_says(lens_archive: Archive, lens: TunedLens) -> None:
    """Every number is recomputed in float64 from the archive's rows and the example table."""
    rows = held_out_rows(lens_archive)
    assert 100 < len(rows) < 600
    final = lens.head.logits(lens_archive["resid_post.2"].torch(rows)).double().log_softmax(-1)
    examples, positions = lens_archive.rows.example[rows], lens_archive.rows.position[rows]
    tokens = [lens_archive.example_table.tokens(int(example)) for example in examples]
    pairs = [
        (i, int(ids[place + 1]))
        for i, (ids, place) in enumerate(zip(tokens, positions, strict=True))
        if place + 1 < len(ids)
    ]
    labelled, labels = map(list, zip(*pairs, strict=True))
    assert lens.report is not None
    for line in lens.report.to_pylist():
        hidden = lens_archive[line["site"]].torch(rows)
        for name, logits in (("", lens.decode(line["site"], hidden)), ("_logit_lens", lens.head.logits(hidden))):
            guess = logits.double().log_softmax(-1)
            kl = (final.exp() * (final - guess)).sum(-1).mean().item()
            assert line["kl" + name] == pytest.approx(kl, rel=1e-4)
            entropy = -guess[labelled, labels].mean().item()
            assert line["cross_entropy" + name] == pytest.approx(entropy, rel=1e-4)
            agreement = (guess.argmax(-1) == final.argmax(-1)).double().mean().item()
            assert line["agreement" + name] == pytest.approx(agreement, abs=1.5 / len(rows))
        assert line["rows"] == len(rows)
        assert line["cross_entropy_model"] == pytest.approx(-final[labelled, labels].mean().item(), rel=1e-4)


def test_the_lens_beats_the_logit_lens_and_refinement_the_ridge(lens_archive: Archive, lens: TunedLens) -> None:
    assert lens.report is not None
    lines = lens.report.to_pylist()
    assert [line["site"] for line in lines] == ["resid_post.0", "resid_post.1"]
    for line in lines:
        assert line["kl"] < line["kl_ridge"] < line["kl_logit_lens"]
        assert line["kept"] == "refined"
        assert line["agreement"] > line["agreement_logit_lens"]
    ridge = TunedLens.fit(lens_archive, refine=False).report
    assert ridge is not None
    assert ridge["kept"].to_pylist() == ["ridge"] * 2
    assert ridge["kl"].to_pylist() == lens.report["kl_ridge"].to_pylist()


def test_a_worse_map_is_not_kept(lens_archive: Archive) -> None:
    """Too high a learning rate loses to the ridge solution; 30 rows of width 32 lose to the logit lens."""
    wild = TunedLens.fit(lens_archive, learning_rate=0.99, epochs=1, batch_rows=8)
    assert wild.report is not None
    assert wild.report["kept"].to_pylist()[-1] == "ridge"
    for line in wild.report.to_pylist():
        assert line["kl"] <= min(line["kl_ridge"], line["kl_logit_lens"])
    few = TunedLens.fit(lens_archive, rows=1, skip_positions=20, refine=False, sites="resid_post.1").report
    assert few is not None
    assert few["kept"].to_pylist() == ["logit lens"]
    assert few["kl_ridge"][0].as_py() > few["kl_logit_lens"][0].as_py() == few["kl"][0].as_py()


def test_final_equals_the_output_of_the_last_block(lens_archive: Archive, tmp_path: Path) -> None:
    """`final` and the blocks' inputs give the same lens as the blocks' outputs."""
    other = make_lens_archive(tmp_path / "b.zarr", sites="resid_pre.*,final")
    points, same = lens_points(lens_archive), lens_points(other, "resid_pre.1-2")
    assert (points.final, same.final) == ("resid_post.2", "final")
    assert points.sites == {1: "resid_post.0", 2: "resid_post.1"}
    assert same.sites == {1: "resid_pre.1", 2: "resid_pre.2"}
    first, second = TunedLens.fit(lens_archive), TunedLens.fit(other, sites=["resid_pre.1-2"])
    for layer in (1, 2):
        assert torch.equal(first.translators[layer].weight, second.translators[layer].weight)
    assert layer_of("resid_pre.0") == 0


@pytest.mark.parametrize("model", ["bert", "gemma2", "opt-post-norm", "gpt2"])
def test_other_heads_train_as_well(model: str, tmp_path: Path) -> None:
    archive = make_lens_archive(tmp_path / "a.zarr", model)
    report = TunedLens.fit(archive, epochs=2, candidates=None).report
    assert report is not None
    for line in report.to_pylist():
        assert line["kl"] < line["kl_logit_lens"]
        entropies = [line[name] for name in line if name.startswith("cross_entropy")]
        assert len(entropies) == 3
        assert {value is None for value in entropies} == {model == "bert"}  # which predicts no next token


def test_candidates_come_close_to_the_full_vocabulary(lens_archive: Archive, lens: TunedLens) -> None:
    some = TunedLens.fit(lens_archive, epochs=3, candidates=24).report
    assert some is not None
    assert lens.report is not None
    exact = lens.report["kl"].to_numpy().mean()
    assert exact < some["kl"].to_numpy().mean() < 1.15 * exact


def test_apply_and_decode_take_any_shape_and_both_names(lens_archive: Archive, lens: TunedLens) -> None:
    hidden = lens_archive["resid_post.0"].torch(slice(0, 12)).view(3, 4, 32)
    assert lens.decode("resid_post.0", hidden).shape == (3, 4, 97)
    assert torch.equal(lens.apply("resid_post.0", hidden), lens.apply("resid_pre.1", hidden))
    assert torch.equal(lens.apply("resid_post.2", hidden), hidden)
    with pytest.raises(AnalysisError, match=r"resid_pre\.0.* 0.* 1, 2"):
        lens.apply("resid_pre.0", hidden)
    with pytest.raises(AnalysisError, match=r"attn_out\.1.*resid_pre or resid_post"):
        lens.apply("attn_out.1", hidden)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    middle = make_lens_archive(tmp_path / "a.zarr", sites="resid_post.0-1,attn_out.1")
    with pytest.raises(AnalysisError, match=r"final.*resid_post\.2.*sites="):
        TunedLens.fit(middle)
    last = make_lens_archive(tmp_path / "b.zarr", sites="resid_post.2,attn_out.1")
    with pytest.raises(AnalysisError, match=r"resid_pre or resid_post.*resid_post\.2"):
        TunedLens.fit(last)
    with pytest.raises(AnalysisError, match=r"attn_out\.1"):
        TunedLens.fit(last, sites="attn_out.1")
    with monkeypatch.context() as patch:
        patch.setattr(Archive, "side_file", lambda *_: b"{}")
        with pytest.raises(AnalysisError, match=r"head/config\.json.*num_hidden_layers"):
            lens_points(last)
    (last.path / "head" / "config.json").write_text('{"num_hidden_layers": 2}')
    with pytest.raises(DamagedArchiveError, match=r"head/config\.json"):
        lens_points(last)


@pytest.mark.parametrize(
    ("name", "value"), [("rows", 0), ("held_out", 1.0), ("learning_rate", 0.0), ("epochs", 0), ("seed", -1)]
)
def test_settings_that_make_no_sense_are_refused(name: str, value: Any) -> None:
    with pytest.raises(AnalysisError, match=f"{name}="):
        LensSettings(**{name: value})


def test_a_finished_folder_is_not_written_over(lens_archive: Archive, tmp_path: Path) -> None:
    TunedLens.fit(lens_archive, out=tmp_path, refine=False)
    with pytest.raises(AnalysisError, match=f"{tmp_path} is not empty.*out="):
        TunedLens.fit(lens_archive, out=tmp_path, refine=False)


def test_the_command_prints_what_it_found(
    lens_archive: Archive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from residua.pipelines.cli.main import main

    out = tmp_path / "lens"
    words = [
        "lens",
        "train",
        str(lens_archive.path),
        "--out",
        str(out),
        "--no-refine",
        "--scheduler",
        "inline",
        "--json",
    ]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert [line["site"] for line in found["sites"]] == ["resid_post.0", "resid_post.1"]
    assert Path(found["plot"]).read_bytes().startswith(b"\x89PNG")
    assert main(["lens", "show", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"{found['sites'][0]['kl']:.3f}" in shown
    assert "--rows" not in shown
    no_better = residua.TunedLens.load(out)
    assert no_better.report is not None
    lines = [{**line, "kept": "logit lens"} if line["depth"] == 1 else line for line in no_better.report.to_pylist()]
    no_better.report = pa.Table.from_pylist(lines, no_better.report.schema)
    no_better.save(tmp_path / "no better")
    assert main(["lens", "show", str(tmp_path / "no better")]) == 0
    assert re.search(r"1 of 2 sites .*logit lens.*--rows", capsys.readouterr().out)
    assert main(["lens", "show", str(lens_archive.path)]) == 1
    assert residua.TunedLens.load(out).report is not None


def test_a_stopped_command_says_what_is_safe(
    lens_archive: Archive, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from residua.pipelines.cli.main import main

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LensTraining, "train", stop)
    words = ["lens", "train", str(lens_archive.path), "--out", str(tmp_path / "lens"), "--scheduler", "inline"]
    assert main(words) == 130
    shown = capsys.readouterr().out
    assert "finished layers are safe" in shown
    assert "same command again" in shown
    monkeypatch.undo()
    assert main([*words, "--json"]) == 0
