"""Replay of encoder-decoders, from rows of either stack: bit for bit as captured, and edits against plain hooks."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import residua
from residua.pipelines.capture.capture import capture_dataset
from residua.pipelines.replay.fidelity import fidelity
from residua.pipelines.replay.replay import replay_dataset
from residua.store.base.errors import CaptureError, PlanError, ResiduaError
from residua.store.verification.verify import verify
from tests.models.tiny_pairs import N_DECODER, N_ENCODER, TINY_PAIRS, VOCABULARY, tiny_whisper

_RNG = np.random.default_rng(3)
LENGTHS = ((6, 7), (9, 12), (4, 3))
ROWS = [
    {"input_ids": _RNG.integers(3, VOCABULARY, n).tolist(), "labels": _RNG.integers(3, VOCABULARY, k).tolist()}
    for n, k in LENGTHS
]
ALL = range(len(ROWS))
SITES = "resid_*,embed,final,logits,q.*,z.*,mlp_out.*,cross_q.*,cross_k.*,cross_v.*,cross_z.*,cross_attn_out.*"


class Captured:
    """A model and what was captured of it; all pairs are one batch of both stacks."""

    def __init__(self, name: str, model: PreTrainedModel, out: Path, rows: Sequence[Any] = ROWS) -> None:
        self.name, self.model, self.rows = name, model, rows
        self.archive = capture_dataset(model, rows, out=out, sites=SITES).archive
        self.decoder, self.encoder = (self.archive.stacks[stack] for stack in ("decoder", "encoder"))
        self.batch = self.decoder.batch_of(0)

    def stored(self, site: str, number: int) -> Any:
        return self.archive.of_sites(site).example(number, site)[site]

    def plain(self, number: int, hooks: Mapping[str, Callable[..., Any]]) -> Tensor:
        """Return the logits of a pair alone, with forward hooks at modules."""
        handles = [self.model.get_submodule(path).register_forward_hook(hook) for path, hook in hooks.items()]
        ids, labels = (torch.tensor([self.rows[number][name]]) for name in ("input_ids", "labels"))
        try:
            with torch.no_grad():
                logits: Tensor = self.model(input_ids=ids, labels=labels).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return logits


@pytest.fixture(scope="module", params=["t5", "bart"])
def captured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """One capture of each model."""
    name = request.param
    return Captured(name, TINY_PAIRS[name](), tmp_path_factory.mktemp(name) / "acts.zarr")


@pytest.mark.parametrize(
    "at",
    [
        None,
        "decoder.resid_post.1",
        "decoder.resid_mid.2",
        "decoder.final",
        "decoder.z.1",
        "decoder.cross_q.1",
        "decoder.cross_z.2",
        "encoder.resid_post.0",
        "encoder.final",
        "encoder.q.1",
        "decoder.cross_k.1,decoder.cross_v.1",
        "encoder.final,decoder.resid_post.0",
    ],
)
def test_stored_rows_give_the_captured_ones_bit_for_bit(captured: Captured, at: str | None) -> None:
    assert captured.batch == captured.encoder.batch_of(0)
    sites = None if at is None else at.split(",")
    streams = [site for site in sites or () if "resid" in site or "final" in site]
    with residua.replay(captured.model, captured.archive, examples=captured.batch, at=sites) as run:
        assert not any("last bits" in note for note in run.notes)
        compared = ["decoder.logits", *(["decoder.resid_post.1", "decoder.cross_v.2"] if "encoder" in str(at) else [])]
        for place, number in enumerate(captured.batch):
            np.testing.assert_array_equal(run.logits[place], captured.stored("decoder.logits", number), err_msg=at)
            for site in compared:
                np.testing.assert_array_equal(run[site][place], captured.stored(site, number), err_msg=f"{at} {site}")
        assert bool(run.skipped_blocks) == (bool(streams) and captured.name != "t5")  # whose first block makes biases


def test_rows_that_are_put_in_replace_the_computed_ones(captured: Captured) -> None:
    """The rows of one pair's source, put into another of the same length, give the logits of a run with these rows."""
    twin = [{**ROWS[0], "input_ids": ROWS[0]["input_ids"][::-1]}, ROWS[0]]
    path = captured.archive.path.with_name("twin.zarr")
    archive = capture_dataset(captured.model, twin, out=path, sites="encoder.final,decoder.final").archive
    edit = {"edit": "swap", "site": "encoder.final", "examples": [0], "source": 1}
    with residua.replay(captured.model, archive, examples=[0], edits=[edit]) as run:
        np.testing.assert_allclose(run.logits[0], captured.plain(0, {}), atol=2e-4)
        assert not np.allclose(run.original_logits[0], captured.plain(0, {}), atol=1e-2)


def blocks_of(captured: Captured) -> tuple[str, str]:
    return ("encoder.block", "decoder.block") if captured.name == "t5" else (
        "model.encoder.layers", "model.decoder.layers")  # fmt: skip


def test_edits_of_either_stack_are_those_of_a_plain_hook(captured: Captured) -> None:
    encoder, decoder = blocks_of(captured)

    def zeroed(_module: object, _args: object, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        new = first.clone()
        new[:, 1] = 0
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def scaled(_module: object, _args: object, output: Any) -> Any:
        return (output[0] * 0.5, *output[1:]) if isinstance(output, tuple) else output * 0.5

    edits: list[Mapping[str, Any]] = [
        {"edit": "zero", "site": "encoder.resid_post.0", "positions": [1]},
        {"edit": "scale", "site": f"decoder.resid_post.{N_DECODER - 2}", "by": 0.5},
    ]
    hooks = {f"{encoder}.0": zeroed, f"{decoder}.{N_DECODER - 2}": scaled}
    for chosen, hooked in ((edits[:1], [f"{encoder}.0"]), (edits[1:], [f"{decoder}.{N_DECODER - 2}"]), (edits, hooks)):
        with residua.replay(captured.model, captured.archive, examples=ALL, edits=chosen) as run:
            for number in ALL:
                wanted = captured.plain(number, {path: hooks[path] for path in hooked})
                np.testing.assert_allclose(run.logits[number], wanted, atol=2e-4)
                assert not np.allclose(run.original_logits[number], wanted, atol=1e-2)
    of_values = {"edit": "zero", "site": "decoder.cross_v.1"}
    path = f"{decoder}.1.layer.1.EncDecAttention.v" if captured.name == "t5" else f"{decoder}.1.encoder_attn.v_proj"
    with residua.replay(captured.model, captured.archive, examples=[2, 0], edits=[of_values]) as run:
        for place, number in enumerate((2, 0)):
            wanted = captured.plain(number, {path: lambda _module, _args, output: output * 0})
            np.testing.assert_allclose(run.logits[place], wanted, atol=2e-4)


def test_tables_of_an_edit_in_the_encoder(captured: Captured, tmp_path: Path) -> None:
    edit = {"edit": "zero", "site": f"encoder.resid_post.{N_ENCODER - 1}"}
    result = replay_dataset(captured.model, captured.archive, out=tmp_path / "out", edits=[edit])
    path = f"{blocks_of(captured)[0]}.{N_ENCODER - 1}"

    def zeroed(_module: object, _args: object, output: Any) -> Any:
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    wanted = []
    for number in ALL:
        log_p, log_q = (
            captured.plain(number, hooks).double().log_softmax(-1) for hooks in ({}, {path: zeroed})
        )  # fmt: skip
        wanted += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
    tokens = result.tokens.sort_by([("example", "ascending"), ("position", "ascending")])
    np.testing.assert_allclose(tokens["kl"], wanted, rtol=1e-2, atol=1e-4)
    np.testing.assert_array_equal(tokens["token"], captured.decoder.rows.token[:])


def test_gradients_reach_both_stacks(captured: Captured) -> None:
    """The gradient of the embeddings of the source, by a small step in float64 of the hidden state."""
    with residua.replay(
        captured.model, captured.archive, examples=[0], at="encoder.final", keep="decoder.resid_post.0", grad=True
    ) as run:
        found = run.gradients({"logit_difference": [5, 7]})
    assert found["encoder.final"][0].shape == (len(ROWS[0]["input_ids"]), 32)
    assert found["decoder.resid_post.0"][0].shape == (len(ROWS[0]["labels"]), 32)
    for site, path in (("encoder.final", f"{blocks_of(captured)[0]}.{N_ENCODER - 1}"),
                       ("decoder.resid_post.0", f"{blocks_of(captured)[1]}.0")):  # fmt: skip
        direction = found[site][0] / found[site][0].norm()
        difference = []
        for step in (1e-2, -1e-2):

            def moved(_module: object, _args: object, output: Any, by: Tensor = step * direction) -> Any:
                return (output[0] + by, *output[1:]) if isinstance(output, tuple) else output + by

            last = captured.plain(0, {path: moved})[-1].double()
            difference.append(last[5] - last[7])
        slope = float(difference[0] - difference[1]) / 2e-2
        np.testing.assert_allclose(slope, float(found[site][0].norm()), rtol=3e-2)


def test_one_stack_alone(captured: Captured) -> None:
    for where in (captured.decoder, captured.archive.path / "decoder"):
        with residua.replay(captured.model, where, examples=captured.batch, at="decoder.resid_post.1") as run:
            for place, number in enumerate(captured.batch):
                np.testing.assert_array_equal(run.logits[place], captured.stored("decoder.logits", number))
    edit = {"edit": "zero", "site": "encoder.resid_post.0"}
    with residua.replay(captured.model, captured.encoder, examples=ALL, edits=[edit]) as run:
        assert not run["encoder.resid_post.0"][2].any()
        with pytest.raises(CaptureError, match=r"encoder alone.*both"):
            _ = run.logits
    with pytest.raises(PlanError, match="encoder alone"):
        replay_dataset(captured.model, captured.encoder, out=captured.archive.path.with_name("never"), edits=[edit])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"edits": [{"edit": "zero", "site": "resid_post.1"}]}, r"encoder.resid_post.1.*decoder.resid_post.1.*one"),
        ({"at": "decoder.resid_post.1", "edits": [{"edit": "zero", "site": "decoder.cross_z.0"}]}, r"cross_z.0.*below"),
        ({"at": "encoder.resid_post.0,encoder.final"}, r"encoder.final.*encoder.resid_post.0"),
        ({"at": "encoder.final", "keep": "encoder.resid_post.0"}, r"encoder.resid_post.0.*below encoder.final"),
    ],
)
def test_what_cannot_be_right_is_refused(captured: Captured, asked: Mapping[str, Any], said: str) -> None:
    at = asked.get("at", "").split(",") if "at" in asked else None
    with (
        pytest.raises(ResiduaError, match=said),
        residua.replay(captured.model, captured.archive, examples=ALL, **{**asked, "at": at}),
    ):
        pass


def test_sites_and_jobs_that_one_stack_does_not_have(captured: Captured, tmp_path: Path) -> None:
    edit = {"edit": "zero", "site": "encoder.resid_post.0"}
    with (
        pytest.raises(PlanError, match=r"encoder.*decoder.*folder of both"),
        residua.replay(captured.model, captured.decoder, examples=ALL, edits=[edit]),
    ):
        pass
    with (
        residua.replay(captured.model, captured.archive, examples=ALL) as run,
        pytest.raises(PlanError, match="contin"),
    ):
        run.generate(3)
    with pytest.raises(PlanError, match=r"capture.*encoder-decoder"):
        replay_dataset(captured.model, captured.archive, out=tmp_path / "out", capture="decoder.final")


def test_fidelity_of_both_stacks(captured: Captured, tmp_path: Path) -> None:
    """Rows of bfloat16, put in by a plain hook one pair at a time, cost what the figures say."""
    sites = "encoder.final,decoder.resid_post.1"
    archive = capture_dataset(captured.model, ROWS, out=tmp_path / "a.zarr", sites=sites, dtype="bfloat16").archive
    found = fidelity(captured.model, archive)
    encoder, decoder = blocks_of(captured)
    for site, path in (("encoder.final", f"{encoder}.{N_ENCODER - 1}"), ("decoder.resid_post.1", f"{decoder}.1")):

        def rounded(_module: object, _args: object, output: Any) -> Any:
            first = (output[0] if isinstance(output, tuple) else output).bfloat16().float()
            return (first, *output[1:]) if isinstance(output, tuple) else first

        divergences = []
        for number in ALL:
            log_p, log_q = (captured.plain(number, hooks).double().log_softmax(-1) for hooks in ({}, {path: rounded}))
            divergences += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
        np.testing.assert_allclose(found.sites[site].kl_mean, np.mean(divergences), rtol=0.05, atol=1e-7)
    assert found.n_tokens == sum(k for _, k in LENGTHS)
    for stack in archive.stacks.values():
        assert (stack.path / "fidelity.json").exists()
        assert not verify(stack.path).problems
    with pytest.raises(PlanError, match="encoder alone"):
        fidelity(captured.model, archive.path / "encoder")


def test_audio_is_given_by_the_caller(tmp_path: Path) -> None:
    features = _RNG.standard_normal((len(ROWS), 8, 24)).astype(np.float32)
    heard = [{"input_features": one, "labels": row["labels"]} for one, row in zip(features, ROWS, strict=True)]
    whisper = Captured("whisper", tiny_whisper(), tmp_path / "a.zarr", heard)
    for at in ("decoder.resid_post.0", "encoder.final"):
        batch = whisper.batch
        given = {"input_features": torch.from_numpy(features[list(batch)])}
        with residua.replay(whisper.model, whisper.archive, examples=batch, at=at, inputs=given) as run:
            for place, number in enumerate(batch):
                np.testing.assert_array_equal(run.logits[place], whisper.stored("decoder.logits", number))
            assert run.skipped_blocks
    with (
        pytest.raises(PlanError, match=r"input_features.*inputs="),
        residua.replay(whisper.model, whisper.archive, examples=ALL),
    ):
        pass


def test_another_model_is_refused(captured: Captured) -> None:
    other = TINY_PAIRS["pegasus"]()
    with pytest.raises(PlanError), residua.replay(other, captured.archive, examples=ALL):
        pass
