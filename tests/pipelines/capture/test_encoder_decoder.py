"""Encoder-decoders over pairs: rows of both stacks against transformers' outputs for single pairs without padding."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import zarr

import residua
from residua.pipelines.capture.capture import capture_dataset
from residua.pipelines.capture.result import CaptureResult
from residua.pipelines.cli.main import main
from residua.pipelines.data.dataset import DatasetReport
from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.pipelines.data.pairs import PairTokens, read_pairs
from residua.pipelines.data.tokenizer import Tokenizer
from residua.store.base.errors import DatasetError, PlanError, UnknownSiteError
from tests.models.tiny_pairs import N_DECODER, N_ENCODER, TINY_PAIRS, VOCABULARY, tiny_whisper

LENGTHS = ((5, 3), (17, 2), (9, 12), (1, 1), (30, 8), (12, 20))
_RNG = np.random.default_rng(0)
ROWS = [
    {
        "input_ids": _RNG.integers(3, VOCABULARY, n).tolist(),
        "labels": [*_RNG.integers(3, VOCABULARY, k).tolist(), 2],
        "topic": f"t{number % 2}",
    }
    for number, (n, k) in enumerate(LENGTHS)
]
SITES = "resid_*,pattern.*,cross_*,logits"
SETTINGS: Mapping[str, Any] = {"batch_tokens": 64, "rows_per_shard": 32}


class Captured:
    """A model, what was captured of it, and what transformers gives for each pair alone."""

    def __init__(self, name: str, out: Path) -> None:
        self.name, self.model = name, TINY_PAIRS[name]()
        self.result: CaptureResult = capture_dataset(self.model, ROWS, out=out, sites=SITES, **SETTINGS)
        self.model.set_attn_implementation("eager")
        self.plain = [self._alone(row) for row in ROWS]

    def _alone(self, row: Mapping[str, Any]) -> Any:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            return self.model(input_ids=ids, labels=labels, output_hidden_states=True, output_attentions=True)

    def check(self, site: str, number: int, wanted: torch.Tensor) -> None:
        """Compare the rows of a site of one example; entries of a pattern past its keys are 0."""
        archive = self.result.archive.of_sites(site)
        found: Any = archive.example(number, site)[site]
        expected = wanted.numpy()
        if found.shape != expected.shape:
            assert not found[..., expected.shape[-1] :].any()
            found = found[..., : expected.shape[-1]]
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, atol=2e-5 * scale, err_msg=f"{self.name} {site} {number}")


@pytest.fixture(scope="module", params=["t5", "bart", "marian"])
def captured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """One capture of all sites for each model."""
    return Captured(request.param, tmp_path_factory.mktemp(request.param) / "acts.zarr")


def test_rows_are_those_of_single_pairs(captured: Captured) -> None:
    for number, plain in enumerate(captured.plain):
        for layer in range(N_ENCODER):
            captured.check(f"encoder.resid_pre.{layer}", number, plain.encoder_hidden_states[layer][0])
            captured.check(f"encoder.pattern.{layer}", number, plain.encoder_attentions[layer][0].transpose(0, 1))
        for layer in range(N_ENCODER - 1):  # the last one is after the final norm
            captured.check(f"encoder.resid_post.{layer}", number, plain.encoder_hidden_states[layer + 1][0])
        for layer in range(N_DECODER):
            captured.check(f"decoder.resid_pre.{layer}", number, plain.decoder_hidden_states[layer][0])
            captured.check(f"decoder.pattern.{layer}", number, plain.decoder_attentions[layer][0].transpose(0, 1))
            captured.check(f"decoder.cross_pattern.{layer}", number, plain.cross_attentions[layer][0].transpose(0, 1))
        for layer in range(N_DECODER - 1):
            captured.check(f"decoder.resid_post.{layer}", number, plain.decoder_hidden_states[layer + 1][0])
        captured.check("decoder.logits", number, plain.logits[0])


def test_cross_attention_adds_up(captured: Captured) -> None:
    """Head outputs are values of the source's tokens, weighted by the patterns of transformers."""
    encoder = captured.result.archive.stacks["encoder"]
    for number, plain in enumerate(captured.plain):
        for layer in range(N_DECODER):
            weights_HQK = plain.cross_attentions[layer][0].double()
            of_source = encoder.example(number)
            values_KHD = torch.from_numpy(of_source[f"decoder.cross_v.{layer}"]).double()
            captured.check(
                f"decoder.cross_z.{layer}", number, torch.einsum("hqk,khd->qhd", weights_HQK, values_KHD).float()
            )
            keys_KHD = of_source[f"decoder.cross_k.{layer}"].astype(np.float64)
            decoder = captured.result.archive.stacks["decoder"]
            queries_QHD = decoder.example(number)[f"decoder.cross_q.{layer}"].astype(np.float64)
            scores_HQK = torch.from_numpy(np.einsum("qhd,khd->hqk", queries_QHD, keys_KHD))
            scores_HQK = scores_HQK * (1.0 if captured.name == "t5" else queries_QHD.shape[-1] ** -0.5)
            np.testing.assert_allclose(scores_HQK.softmax(-1), weights_HQK, atol=1e-4)


def test_rows_have_the_tokens_of_their_side(captured: Captured) -> None:
    stacks = captured.result.archive.stacks
    prepare: Any = captured.model.prepare_decoder_input_ids_from_labels
    for number, row in enumerate(ROWS):
        shifted = prepare(labels=torch.tensor([row["labels"]]))[0].tolist()
        sides = {"encoder": row["input_ids"], "decoder": shifted}
        for name, ids in sides.items():
            archive = stacks[name]
            assert archive.example_table.tokens(number).tolist() == ids
            rows = slice(*archive.example_table.rows(number))
            assert archive.rows.token[rows].tolist() == ids
            assert archive.rows.position[rows].tolist() == list(range(len(ids)))
    assert [len(stacks[name].example_table) for name in stacks] == [len(ROWS)] * 2
    assert stacks["decoder"].examples["source_ids"].to_pylist() == [row["input_ids"] for row in ROWS]
    for archive in stacks.values():
        assert archive.examples["topic"].to_pylist() == [row["topic"] for row in ROWS]
        assert archive.examples["source_index"].to_pylist() == list(range(len(ROWS)))


def test_the_archive_is_sound_and_plain(captured: Captured) -> None:
    archive = captured.result.archive
    assert archive.is_sealed
    assert residua.verify(archive.path).is_sound
    assert archive.stacks["decoder"].plan.rules["stack"] == "decoder"
    plain: Any = zarr.open_group(archive.path, mode="r")
    np.testing.assert_array_equal(plain["decoder/sites/decoder/cross_q/1"][:], archive["decoder.cross_q.1"][:])


def test_a_capture_is_resumed_and_reproduced(tmp_path: Path) -> None:
    model, out = TINY_PAIRS["bart"](), tmp_path / "acts.zarr"
    sites = "resid_post.*,decoder.cross_k.1,module:model.decoder.layers.1.fc1,module:model.encoder.layers.0.fc1"

    class Killed(Exception):  # noqa: N818  # stands for the end of the process
        """Ends the run in the decoder's pass."""

    def kill(stats: Any) -> None:
        if (out / "decoder" / "zarr.json").exists() and stats.rows:
            raise Killed

    with pytest.raises(Killed):
        capture_dataset(model, ROWS, out=out, sites=sites, on_batch=kill, **SETTINGS)
    assert residua.open(out).stacks["encoder"].is_sealed
    assert not residua.open(out).is_sealed
    result = capture_dataset(model, ROWS, out=out, sites=sites, **SETTINGS)
    assert result.resumed
    assert result.archive.is_sealed
    again = capture_dataset(model, iter(ROWS), out=tmp_path / "b.zarr", sites=sites, **SETTINGS).archive
    for site in again.sites:
        np.testing.assert_array_equal(again[site][:], result.archive[site][:])
    for stack in ("encoder", "decoder"):
        assert residua.reproduce(model, out / stack).is_exact
    with pytest.raises(PlanError, match=r"encoder and decoder"):
        capture_dataset(model, ROWS, out=out, sites="encoder.resid_post.*", **SETTINGS)
    changed = [{**row, "input_ids": row["input_ids"][::-1]} for row in ROWS]  # the decoder's tokens stay the same
    capture_dataset(model, changed, out=tmp_path / "c.zarr", sites="decoder.final", **SETTINGS)
    with pytest.raises(PlanError, match=r"dataset\.source"):
        capture_dataset(model, ROWS, out=tmp_path / "c.zarr", sites="decoder.final", **SETTINGS)


def test_the_encoder_alone_runs_no_decoder(tmp_path: Path) -> None:
    model = TINY_PAIRS["t5"]()
    n_runs: list[int] = []
    result = None
    decoder: Any = model.get_submodule("decoder")
    handle = decoder.block[2].register_forward_hook(lambda *_: n_runs.append(1))
    capture_dataset(model, ROWS, out=tmp_path / "probe.zarr", sites="encoder.resid_post.*", **SETTINGS)
    before = len(n_runs)  # finding sites and identity runs it a few times, whatever the number of batches
    result = capture_dataset(model, ROWS * 4, out=tmp_path / "acts.zarr", sites="encoder.resid_post.*", **SETTINGS)
    handle.remove()
    assert len(n_runs) <= 2 * before
    assert tuple(result.archive.stacks) == ("encoder",)


def test_the_command_line_captures_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TINY_PAIRS["marian"]().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({**row, "goal": row["labels"]}) + "\n" for row in ROWS))
    words = ["capture", "--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "pairs.jsonl")]
    out = str(tmp_path / "acts.zarr")
    assert main([*words, "--out", out, "--target-column", "goal", "--sites", "resid_post.1"]) == 0
    assert "1 sites of 52 rows" in capsys.readouterr().out
    assert main(["info", out, "--json"]) == 0
    stacks = json.loads(capsys.readouterr().out)["stacks"]
    assert stacks["encoder"]["rows"] == sum(n for n, _ in LENGTHS)
    assert stacks["decoder"]["rows"] == sum(k + 1 for _, k in LENGTHS)
    assert main(["info", out]) == 0
    assert "decoder.resid_post.1" in capsys.readouterr().out
    assert main(["sites", "--model", str(tmp_path / "model")]) == 0
    assert "--weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "settings", "error", "said"),
    [
        ([{"input_ids": [3]}], {}, DatasetError, r"input_ids.*target_column"),
        (ROWS, {"target_column": "goal"}, DatasetError, r"goal.*topic"),
        (ROWS, {"positions": "assistant"}, DatasetError, r"assistant.*every:N"),
        (ROWS, {"max_length": 8, "long_examples": "split"}, DatasetError, r"split.*truncate"),
        (ROWS, {"max_length": 8, "long_examples": "refuse"}, DatasetError, r"row 1.*source of 17.*max_length"),
        (ROWS, {"max_target_length": 4, "long_examples": "refuse"}, DatasetError, r"row 2.*target of 13"),
        ([{"input_ids": [3], "labels": [500]}], {}, DatasetError, r"500"),
        (ROWS, {"tp": 2}, PlanError, r"tp="),
        (ROWS, {"sites": "encoder.cross_q.0"}, UnknownSiteError, r"encoder\.cross_q\.0"),
        (ROWS, {"sites": "vision.resid_post.0"}, UnknownSiteError, r"vision.*encoder\.resid_post\.0-1"),
    ],
)
def test_what_does_not_fit_is_refused(
    rows: list[Any], settings: dict[str, Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"sites": "decoder.final", **settings}
    with pytest.raises(error, match=said):
        capture_dataset(TINY_PAIRS["bart"](), rows, out=tmp_path / "a.zarr", **asked)
    assert not list(tmp_path.iterdir())


def test_pairs_are_cut_and_left_out_as_asked(tmp_path: Path) -> None:
    rows = [*ROWS, {"input_ids": [], "labels": [5]}, {"input_ids": [5], "labels": [7, 8, -100, -100]}]
    result = capture_dataset(
        TINY_PAIRS["bart"](), rows, out=tmp_path / "a.zarr", sites="final", max_length=8, max_target_length=6
    )
    decoder = result.archive.stacks["decoder"]
    assert decoder.examples["source_ids"].to_pylist()[1] == ROWS[1]["input_ids"][:8]
    assert [len(decoder.example_table.tokens(number)) for number in range(len(decoder.example_table))][-2:] == [6, 2]
    assert result.dataset.n_empty == 1
    assert result.dataset.n_truncated == 7
    assert any("lost" in note for note in result.notes)
    given = [{"input_ids": [5, 6], "decoder_input_ids": [9, 8, 7]}]
    archive = capture_dataset(TINY_PAIRS["bart"](), given, out=tmp_path / "b.zarr", sites="final").archive
    assert archive.stacks["decoder"].example_table.tokens(0).tolist() == [9, 8, 7]


HEARD = [
    {"input_features": _RNG.standard_normal((8, 24)).astype(np.float32), "labels": row["labels"], "topic": row["topic"]}
    for row in ROWS
]


def test_rows_of_audio_are_positions_of_the_encoder(tmp_path: Path) -> None:
    model, settings = tiny_whisper(), {"sites": "resid_pre.*,cross_pattern.*,cross_v.0,logits", **SETTINGS}
    archive = capture_dataset(model, HEARD, out=tmp_path / "a.zarr", **settings).archive
    encoder, decoder = archive.stacks["encoder"], archive.stacks["decoder"]
    assert (encoder.rows.token[:] == -1).all()
    assert encoder.examples["n_rows"].to_pylist() == [12] * len(HEARD)
    model.set_attn_implementation("eager")
    for number, row in enumerate(HEARD):
        features, labels = torch.from_numpy(row["input_features"])[None], torch.tensor([row["labels"]])
        with torch.no_grad():
            plain = model(input_features=features, labels=labels, output_hidden_states=True, output_attentions=True)
        found: dict[str, Any] = {**encoder.example(number), **decoder.example(number)}
        wanted = {
            "encoder.resid_pre.1": plain.encoder_hidden_states[1][0],
            "decoder.resid_pre.2": plain.decoder_hidden_states[2][0],
            "decoder.cross_pattern.1": plain.cross_attentions[1][0].transpose(0, 1),
            "decoder.logits": plain.logits[0],
        }
        for site, tensor in wanted.items():
            np.testing.assert_allclose(found[site], tensor, atol=1e-4, err_msg=site)
    model.set_attn_implementation("sdpa")
    assert not capture_dataset(model, HEARD, out=tmp_path / "a.zarr", **settings).stats.rows
    with pytest.raises(PlanError, match=r"dataset\.source"):
        capture_dataset(model, HEARD[::-1], out=tmp_path / "a.zarr", **settings)
    for stack in archive.stacks.values():
        with pytest.raises(PlanError, match=r"input_features|token"):
            residua.reproduce(model, stack.path)


class Extractor:
    """Stands for a feature extractor of transformers: makes frames of a waveform, at one sampling rate."""

    def __call__(self, audio: Any, *, sampling_rate: int, return_tensors: str) -> dict[str, Any]:
        """Return features of fixed length."""
        if sampling_rate != 16000:
            raise ValueError(f"the sampling rate is {sampling_rate}, and has to be 16000")
        assert return_tensors == "np"
        return {"input_features": np.resize(audio, (1, 8, 24))}


def test_waveforms_go_through_the_feature_extractor(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"audio": {"array": [0.1 * n, 0.2, 0.3], "sampling_rate": 16000}, "labels": [5, n + 3]} for n in range(3)
    ]
    kwargs: dict[str, Any] = {"sites": "final", "processor": Extractor()}
    heard = capture_dataset(tiny_whisper(), rows, out=tmp_path / "a.zarr", **kwargs).archive
    frames: Any = np.resize
    made = [{**row, "input_features": frames(row["audio"]["array"], (8, 24))} for row in rows]
    given = capture_dataset(tiny_whisper(), made, out=tmp_path / "b.zarr", sites="final").archive
    for site in given.sites:
        np.testing.assert_array_equal(heard[site][:], given[site][:])
    rows[1]["audio"] = {"array": [0.1], "sampling_rate": 8000}
    with pytest.raises(DatasetError, match=r"row 1.*8000"):
        capture_dataset(tiny_whisper(), rows, out=tmp_path / "c.zarr", **kwargs)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a", "labels": [3]}], r"audio.*input_features.*text"),
        ([{"audio": {"array": [0.1], "sampling_rate": 16000}, "labels": [3]}], r"processor="),
        ([{"input_features": np.zeros((8, 20)), "labels": [3]}], r"row 0.*\(8, 20\).*\(8, 24\)"),
        ([{"input_features": "loud", "labels": [3]}], r"row 0.*numbers"),
    ],
)
def test_audio_that_does_not_fit_is_refused(rows: list[Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=said):
        capture_dataset(tiny_whisper(), rows, out=tmp_path / "a.zarr", sites="decoder.final")
    assert not list(tmp_path.iterdir())


class Words:
    """Stands for a tokenizer with a vocabulary for sources and another for targets, as Marian's."""

    chat_template = None
    all_special_ids = (2,)

    def __call__(self, text: Any = None, *, text_target: Any = None, add_special_tokens: bool = True, **_: Any) -> Any:
        """Return one id a letter, shifted for targets, with an end token."""
        texts = text if text_target is None else text_target
        shift, end = (0 if text_target is None else 20), [2] * add_special_tokens
        encoded = [[ord(letter) - 90 + shift for letter in one] + end for one in ([texts] if texts == "a" else texts)]
        return {"input_ids": encoded[0] if texts == "a" else encoded}

    def get_vocab(self) -> dict[str, int]:
        """Return some vocabulary."""
        return {"a": 7}


def test_texts_of_targets_are_tokenized_as_targets() -> None:
    tokens = PairTokens(
        tokenizer=cast("Tokenizer", Words()),
        shifted=lambda labels: np.roll(labels, 1),
        source_limit=None,
        target_limit=None,
        special_ids=frozenset(),
        source_vocab=VOCABULARY,
        target_vocab=VOCABULARY,
    )
    rows = [{"source": "ab", "target": "dcb", "n": 1}, {"source": "", "target": "d", "n": 2}]
    report = DatasetReport()
    (pair,) = read_pairs(rows, settings=DatasetSettings(), tokens=tokens, report=report)
    assert pair.encoder.input_ids.tolist() == [7, 8, 2]
    assert pair.decoder.input_ids.tolist() == [2, 30, 29, 28]
    assert pair.decoder.columns["source_ids"].tolist() == [7, 8, 2]  # type: ignore[attr-defined]  # an array
    assert report.n_empty == 1
