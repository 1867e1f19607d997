"""A lens on a small archive: judged by hand, the same on every cluster, never worse than the logit lens."""

import json
import multiprocessing
import time
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import residua
from residua.analysis import lens_train
from residua.analysis.cluster import Cluster, connect
from residua.analysis.lens import TunedLens
from residua.analysis.lens_points import depth_of, points_of
from residua.analysis.lens_rows import LensRows
from residua.analysis.lens_settings import LensSettings
from residua.analysis.split import held_out
from residua.store.archive import Archive
from residua.store.errors import AnalysisError, DamagedArchiveError
from tests.analysis.lens_archive import make_lens_archive

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return make_lens_archive(tmp_path_factory.mktemp("lens") / "a.zarr")


@pytest.fixture(scope="module")
def lens(archive: Archive) -> TunedLens:
    return TunedLens.fit(archive, epochs=3)


def is_late(archive: Archive) -> npt.NDArray[np.bool_]:
    return archive.rows.position[:].astype(np.int64) > 0


def held_out_rows(archive: Archive) -> npt.NDArray[np.int64]:
    is_held = held_out(archive.rows.example[:].astype(np.int64), fraction=0.1)
    return np.flatnonzero(is_held & is_late(archive))


def test_the_report_is_what_the_definition_says(archive: Archive, lens: TunedLens) -> None:
    """Everything is computed again in float64, from the archive's rows and the example table."""
    rows = held_out_rows(archive)
    assert 100 < len(rows) < 600
    final = lens.head.logits(archive["resid_post.2"].torch(rows)).double().log_softmax(-1)
    examples, positions = archive.rows.example[rows], archive.rows.position[rows]
    tokens = [archive.example_table.tokens(int(example)) for example in examples]
    pairs = [
        (i, int(ids[place + 1]))
        for i, (ids, place) in enumerate(zip(tokens, positions, strict=True))
        if place + 1 < len(ids)
    ]
    labelled, labels = map(list, zip(*pairs, strict=True))
    assert lens.report is not None
    for line in lens.report.to_pylist():
        hidden = archive[line["site"]].torch(rows)
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


def test_the_lens_beats_the_logit_lens_and_refinement_the_ridge(archive: Archive, lens: TunedLens) -> None:
    assert lens.report is not None
    lines = lens.report.to_pylist()
    assert [line["site"] for line in lines] == ["resid_post.0", "resid_post.1"]
    for line in lines:
        assert line["kl"] < line["kl_ridge"] < line["kl_logit_lens"]
        assert line["kept"] == "refined"
        assert line["agreement"] > line["agreement_logit_lens"]
    ridge = TunedLens.fit(archive, refine=False).report
    assert ridge is not None
    assert ridge["kept"].to_pylist() == ["ridge"] * 2
    assert ridge["kl"].to_pylist() == lens.report["kl_ridge"].to_pylist()


def test_what_makes_it_worse_is_not_kept(archive: Archive) -> None:
    """A refinement far too fast loses against the ridge; one from 30 rows of width 32 loses against the logit lens."""
    wild = TunedLens.fit(archive, learning_rate=0.99, epochs=1, batch_rows=8)
    assert wild.report is not None
    for line in wild.report.to_pylist():
        assert line["kept"] != "refined"
        assert line["kl"] <= line["kl_logit_lens"]
    few = TunedLens.fit(archive, rows=1, skip_positions=20, refine=False, sites="resid_post.1").report
    assert few is not None
    assert few["kept"].to_pylist() == ["logit lens"]
    assert few["kl_ridge"][0].as_py() > few["kl_logit_lens"][0].as_py() == few["kl"][0].as_py()


def test_rows_of_held_out_examples_never_train(archive: Archive) -> None:
    settings = LensSettings()
    reader = LensRows(archive, settings)
    training = np.sort(np.concatenate(list(reader.waves(128, 0, 0, 1))))
    assert training.tolist() == reader.training(reader.chunks()).tolist()
    is_held = held_out(archive.rows.example[:].astype(np.int64), fraction=0.1)
    late = is_late(archive)
    assert training.tolist() == np.flatnonzero(~is_held & late).tolist()
    assert reader.judging().tolist() == np.flatnonzero(is_held & late).tolist()
    shares = [np.concatenate(list(reader.waves(128, 1, part, 3))) for part in range(3)]
    assert np.sort(np.concatenate(shares)).tolist() == training.tolist()
    everything = LensRows(archive, LensSettings(skip_positions=0))
    assert len(everything.training(everything.chunks())) + len(everything.judging()) == archive.n_rows


def test_few_rows_come_from_everywhere(archive: Archive) -> None:
    reader = LensRows(archive, LensSettings(rows=512, seed=5))
    chunks = reader.chunks()
    assert len(chunks) == 4
    assert chunks.max() > archive.n_rows / 2
    assert not np.array_equal(chunks, np.arange(4) * 128)
    assert 256 < len(reader.training(chunks)) <= 512


def test_an_archive_of_which_little_is_captured_is_judged_on_all_that_is(tmp_path: Path) -> None:
    """Held-out examples that are not captured must not use up those that may be looked at."""
    whole = make_lens_archive(tmp_path / "a.zarr", rows_per_shard=64)
    expected = held_out_rows(whole)
    for path in sorted((whole.path / "commits").iterdir())[12:]:
        path.unlink()
    begun = Archive(whole.path)
    expected = expected[expected < 12 * 64]
    reader, few = LensRows(begun, LensSettings()), len(expected) // 2
    assert reader.judging().tolist() == expected.tolist()
    assert 0.8 * few < len(reader.judging(few)) <= few


def fit_on(cluster: Cluster, archive: Archive, out: Path, **settings: Any) -> bytes:
    TunedLens.fit(archive, out=out, cluster=cluster, **settings)
    return (out / "params.pt").read_bytes()


class Pretended:
    """This process, as a cluster of another size."""

    def __init__(self, inline: Cluster, n_workers: int, memory_limit: int) -> None:
        self.n_workers, self.memory_limit, self.map = n_workers, memory_limit, inline.map


def test_little_memory_parts_layers_and_spare_workers_split_rows(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About 2,000 rows train; 20 workers for 2 layers would make ten parts of them, were there rows enough."""
    with connect("inline") as inline:
        alone = fit_on(inline, archive, tmp_path / "alone")
        assert fit_on(Pretended(inline, 1, 2**20), archive, tmp_path / "little") == alone
        assert fit_on(Pretended(inline, 3, 2**32), archive, tmp_path / "three") == alone
        assert fit_on(Pretended(inline, 20, 2**32), archive, tmp_path / "few rows") == alone
        split = fit_on(inline, archive, tmp_path / "split", parts=2)
        monkeypatch.setattr(lens_train, "_PART_ROWS", 800)
        assert fit_on(Pretended(inline, 4, 2**32), archive, tmp_path / "four") == split
        assert fit_on(Pretended(inline, 20, 2**32), archive, tmp_path / "twenty") == split
        assert fit_on(Pretended(inline, 20, 2**32), archive, tmp_path / "told", parts=1) == alone


def kill_a_worker(moment: Path) -> None:
    """Kill a worker once a file is there: the layers are being fitted then."""
    deadline = time.monotonic() + 120
    while not moment.is_file():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    victim, *_ = multiprocessing.active_children()
    victim.kill()


def test_every_number_of_workers_gives_the_same_lens(archive: Archive, tmp_path: Path) -> None:
    """To the bit, whichever layers go together, and though a worker dies; where rows are split, it is another."""
    with connect("inline") as inline:
        alone = fit_on(inline, archive, tmp_path / "alone", epochs=2)
        assert fit_on(inline, archive, tmp_path / "apart", epochs=2, together=1) == alone
        split = fit_on(inline, archive, tmp_path / "split", epochs=2, parts=2)
    with connect(workers=2, memory_limit="2GiB") as two:
        assert fit_on(two, archive, tmp_path / "two", epochs=2) == alone
        killer = Thread(target=kill_a_worker, args=(tmp_path / "parts" / "work" / "sums-2.safetensors",))
        killer.start()
        assert fit_on(two, archive, tmp_path / "parts", epochs=2, parts=2) == split
        killer.join()
    assert split != alone
    scores = [TunedLens.load(tmp_path / name).report for name in ("alone", "split")]
    one, other = (score["kl"].to_numpy().mean() for score in scores if score is not None)
    assert abs(one - other) < 0.1 * one


def test_final_is_the_last_blocks_output(archive: Archive, tmp_path: Path) -> None:
    """Captured as `final`, beside the blocks' inputs, the same rows give the same lens."""
    other = make_lens_archive(tmp_path / "b.zarr", sites="resid_pre.*,final")
    points, same = points_of(archive), points_of(other, "resid_pre.1-2")
    assert (points.final, same.final) == ("resid_post.2", "final")
    assert points.sites == {1: "resid_post.0", 2: "resid_post.1"}
    assert same.sites == {1: "resid_pre.1", 2: "resid_pre.2"}
    first, second = TunedLens.fit(archive), TunedLens.fit(other, sites=["resid_pre.1-2"])
    for depth in (1, 2):
        assert torch.equal(first.translators[depth].weight, second.translators[depth].weight)
    assert depth_of("resid_pre.0") == 0


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


def test_candidates_come_close_to_the_whole_vocabulary(archive: Archive, lens: TunedLens) -> None:
    some = TunedLens.fit(archive, epochs=3, candidates=24).report
    assert some is not None
    assert lens.report is not None
    exact = lens.report["kl"].to_numpy().mean()
    assert exact < some["kl"].to_numpy().mean() < 1.15 * exact


def test_apply_and_decode_take_any_shape_and_both_names(archive: Archive, lens: TunedLens) -> None:
    hidden = archive["resid_post.0"].torch(slice(0, 12)).view(3, 4, 32)
    assert lens.decode("resid_post.0", hidden).shape == (3, 4, 97)
    assert torch.equal(lens.apply("resid_post.0", hidden), lens.apply("resid_pre.1", hidden))
    assert torch.equal(lens.apply("resid_post.2", hidden), hidden)
    with pytest.raises(AnalysisError, match=r"resid_pre\.0, which is depth 0, but was trained at 1, 2"):
        lens.apply("resid_pre.0", hidden)
    with pytest.raises(AnalysisError, match=r"attn_out\.1, but lenses decode the residual stream"):
        lens.apply("attn_out.1", hidden)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    middle = make_lens_archive(tmp_path / "a.zarr", sites="resid_post.0-1,attn_out.1")
    with pytest.raises(AnalysisError, match=r"neither final nor resid_post.2"):
        TunedLens.fit(middle)
    last = make_lens_archive(tmp_path / "b.zarr", sites="resid_post.2,attn_out.1")
    with pytest.raises(AnalysisError, match="before the final residual stream"):
        TunedLens.fit(last)
    with pytest.raises(AnalysisError, match=r"attn_out\.1"):
        TunedLens.fit(last, sites="attn_out.1")
    with monkeypatch.context() as patch:
        patch.setattr(Archive, "side_file", lambda *_: b"{}")
        with pytest.raises(AnalysisError, match="does not say how many blocks"):
            points_of(last)
    (last.path / "head" / "config.json").write_text('{"num_hidden_layers": 2}')
    with pytest.raises(DamagedArchiveError, match=r"head/config\.json was altered"):
        points_of(last)


@pytest.mark.parametrize(
    ("name", "value"), [("rows", 0), ("held_out", 1.0), ("learning_rate", 0.0), ("epochs", 0), ("seed", -1)]
)
def test_settings_that_make_no_sense_are_refused(name: str, value: Any) -> None:
    with pytest.raises(AnalysisError, match="--" + name.replace("_", "-")):
        LensSettings(**{name: value})


def test_a_finished_folder_is_not_written_over(archive: Archive, tmp_path: Path) -> None:
    TunedLens.fit(archive, out=tmp_path, refine=False)
    with pytest.raises(AnalysisError, match="is not empty"):
        TunedLens.fit(archive, out=tmp_path, refine=False)


def test_the_command_prints_what_it_found(archive: Archive, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from residua.pipelines.cli import main

    out = tmp_path / "lens"
    words = ["lens", "train", str(archive.path), "--out", str(out), "--no-refine", "--scheduler", "inline", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert [line["site"] for line in found["sites"]] == ["resid_post.0", "resid_post.1"]
    assert Path(found["plot"]).read_bytes().startswith(b"\x89PNG")
    assert main(["lens", "show", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"{found['sites'][0]['kl']:.3f}" in shown
    assert main(["lens", "show", str(archive.path)]) == 1
    assert residua.TunedLens.load(out).report is not None


def test_a_stopped_command_says_what_is_safe(
    archive: Archive, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from residua.pipelines.cli import main

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("residua.analysis.lens_train.fit_layers", stop)
    words = ["lens", "train", str(archive.path), "--out", str(tmp_path / "lens"), "--scheduler", "inline"]
    assert main(words) == 130
    assert "finished layers are safe. Run the same command again" in capsys.readouterr().out
    monkeypatch.undo()
    assert main([*words, "--json"]) == 0
