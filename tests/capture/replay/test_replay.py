"""Replay without edits gives the captured bits on every architecture, with the lower blocks skipped."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import residua
from residua.capture.sites.anatomy import anatomy_of
from residua.store.base.errors import CaptureError, PlanError
from residua.store.read.archive import Archive
from tests.calls import count_calls
from tests.capture.manual_hooks import state_of
from tests.capture.replay_samples import EVEN, LAST, LENGTHS, MODELS, PADDED, captured, model_of, stored
from tests.models.tiny import LAYERS, TINY

MIXTURES = ("mixtral", "qwen3_moe")
SHARED_KEYS = "gemma4"
STARTS = {"resid_post.0": 1, "resid_pre.2": 2, "final": LAYERS}
LATER = {
    "resid_post.0": ["resid_post.1", "resid_pre.2", "resid_post.2", "final"],
    "resid_pre.2": ["resid_post.2", "final"],
    "final": ["final"],
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OTHER_BATCH = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""The tolerance that docs/replay.md states for batches other than the plan's, relative to the largest logit."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "roberta"])
def test_stored_rows_give_the_captured_bits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of(name, dtype)
    has_z = name not in ("gptj", "bloom")
    archive = captured(model, tmp_path / "a", sites="resid_post.*,resid_pre.2,final,logits" + ",z.1" * has_z)
    for at, examples in [*((at, e) for at in STARTS for e in (EVEN, PADDED)), ("z.1" if has_z else None, PADDED)]:
        with residua.replay(model, archive, examples=examples, at=at, keep=LATER.get(str(at), [])) as run:
            for place, example in enumerate(examples):
                assert torch.equal(run.logits[place], stored(archive, "logits", example)), (at, example)
                for site in LATER.get(str(at), []):
                    assert torch.equal(run[site][place], stored(archive, site, example)), (at, site, example)
            in_full = at not in STARTS or (name in MIXTURES and examples == PADDED)
            cannot = name == SHARED_KEYS and at == "resid_pre.2"
            assert run.skipped_blocks == (0 if in_full or cannot else STARTS[str(at)])
            assert len(run.notes) == (at is not None and (in_full or cannot)), run.notes


def test_a_note_names_a_model_that_needs_its_lower_blocks(tmp_path: Path) -> None:
    model = model_of(SHARED_KEYS)
    archive = captured(model, tmp_path / "a")
    with residua.replay(model, archive, examples=EVEN, at="resid_pre.2") as run:
        assert "Gemma4ForCausalLM" in run.notes[0]
        assert "lower blocks" in run.notes[0]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Archive]:
    model = model_of("llama")
    return model, captured(model, tmp_path_factory.mktemp("llama") / "a")


Given = tuple[nn.Module, Archive]


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_lower_blocks_do_not_run_and_their_rows_are_not_read(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    archive = captured(model, tmp_path / "a", sites="resid_post.*,logits")
    anatomy = anatomy_of(model)
    assert anatomy is not None
    ran: Counter[int] = Counter()
    for layer, path in enumerate(anatomy.blocks):
        child = next(m for m in anatomy.modules[path].modules() if isinstance(m, nn.Linear))
        child.register_forward_hook(lambda *_, layer=layer: ran.update([layer]))
    for layer in (0, 2):  # the replay does not need these sites
        (archive.path / f"sites/resid_post/{layer}/c/0/0").unlink()
    with residua.replay(model, residua.open(archive.path), examples=EVEN, at="resid_post.1") as run:
        ran.clear()
        assert torch.equal(run.logits[1], stored(archive, "logits", 1))
    assert ran == {2: 1}


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in TINY), ("mistral", DTYPES[1]), ("phi", DTYPES[2])]
)
def test_another_batch_gives_the_same_to_rounding_and_a_note(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of(name, dtype)
    archive = captured(model, tmp_path / "a", sites="resid_post.0,logits")
    with residua.replay(model, archive, examples=[2, 0], at="resid_post.0") as run:
        for place, example in enumerate((2, 0)):
            expected = stored(archive, "logits", example)
            assert (run.logits[place] - expected).abs().max() <= OTHER_BATCH[dtype] * expected.abs().max()
        assert "example 2 ran in another batch" in run.notes[-1]
        assert "(examples 3, 2)" in run.notes[-1]
    assert archive.batch_of(2) == (3, 2)


def test_rows_that_were_not_captured_are_computed(tmp_path: Path) -> None:
    model = model_of("llama")
    full = captured(model, tmp_path / "full")
    sparse = captured(model, tmp_path / "sparse", positions="every:4")
    with residua.replay(model, sparse, examples=PADDED, at="resid_post.0") as run:
        for place, example in enumerate(PADDED):
            assert torch.equal(run.logits[place], stored(full, "logits", example))
            assert torch.equal(run["final"][place], stored(sparse, "final", example))
        assert run.skipped_blocks == 0
        assert "example 3 has 3 of 11 tokens" in run.notes[0]
        assert "in full" in run.notes[0]


def test_results_are_computed_when_asked_for_and_once(llama: Given) -> None:
    model, archive = llama
    calls: list[int] = []
    handle = count_calls(model, calls)
    with residua.replay(model, archive, examples=EVEN, at="resid_post.1", keep="final") as run:
        assert not calls
        assert run.logits is run.logits
        assert run["final"] is run["final"]
        assert len(calls) == 1
        assert run["mlp_out.2"][0].shape == (LENGTHS[0], 32)
        assert len(calls) == 2
    handle.remove()
    assert run.logits[0].shape == (LENGTHS[0], 97)
    with pytest.raises(CaptureError, match="over"):
        run["attn_out.2"]


def test_a_model_without_logits_runs_once_however_often_they_are_asked_for(tmp_path: Path) -> None:
    """Where several processes hold the model, another pass would wait for the others for ever."""
    model: Any = model_of("llama").base_model  # has no LM head
    archive = captured(model, tmp_path / "a", sites="resid_post.*")
    calls: list[int] = []
    count_calls(model, calls)
    with residua.replay(model, archive, examples=EVEN, at="resid_post.1", keep="final") as run:
        for _ in range(2):
            with pytest.raises(CaptureError, match="no logits"):
                _ = run.logits
        assert run["final"][0].shape == (LENGTHS[0], 32)
        assert len(calls) == 1


def test_patterns_have_the_keys_of_their_example(tmp_path: Path) -> None:
    model = model_of("llama")
    archive = captured(model, tmp_path / "a", sites="resid_post.0,pattern.2,logits")
    with residua.replay(model, archive, examples=PADDED, at="resid_post.0", keep="pattern.2") as run:
        assert run.notes == ()  # it uses eager attention, as the capture did for its patterns
        for place, example in enumerate(PADDED):
            n_tokens = LENGTHS[example]
            assert torch.equal(run["pattern.2"][place], stored(archive, "pattern.2", example)[..., :n_tokens])
            assert torch.equal(run.logits[place], stored(archive, "logits", example))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_leaving_restores_everything(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    archive = captured(model, tmp_path / "a", sites="resid_post.0")
    foreign = model.base_model.register_forward_hook(lambda *_: None)
    own = lambda *args, **kwargs: type(model).forward(model, *args, **kwargs)  # noqa: E731  # a forward set by hand
    model.forward = own
    before = state_of(model)
    with residua.replay(model, archive, examples=LAST, at="resid_post.0") as run:
        assert run.logits
    assert state_of(model) == before

    def fail(_site: str, _rows: torch.Tensor) -> torch.Tensor:
        raise KeyError("by hand")

    edit = {"edit": "function", "site": "resid_post.1", "function": fail}
    with (
        pytest.raises(KeyError, match="by hand"),
        residua.replay(model, archive, examples=LAST, at="resid_post.0", edits=[edit]) as run,
    ):
        assert run.logits
    assert state_of(model) == before
    foreign.remove()


def test_offloaded_weights_give_the_same_bits(llama: Given, tmp_path: Path) -> None:
    from accelerate import dispatch_model  # type: ignore[import-untyped]  # it ships no types

    _, archive = llama
    places: dict[str, Any] = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
    }
    places |= {"model.layers.2": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    spread: Any = dispatch_model(
        model_of("llama"), places, main_device=torch.device("cpu"), offload_dir=str(tmp_path), force_hooks=True
    )
    before = state_of(spread)
    for at, n_skipped in (("resid_post.0", 1), ("resid_pre.2", 2), (None, 0)):
        with residua.replay(spread, archive, examples=EVEN, at=at, keep="final") as run:
            assert run.skipped_blocks == n_skipped
            for place, example in enumerate(EVEN):
                assert torch.equal(run.logits[place], stored(archive, "logits", example))
                assert torch.equal(run["final"][place], stored(archive, "final", example))
            assert run.notes == (), "offloaded weights are compared too"
    same = [0, 1, 3, 4, 5, 6]  # all but the weights, which accelerate loads and removes
    assert [state_of(spread)[i] for i in same] == [before[i] for i in same]


def test_another_model_is_refused_unless_forced(llama: Given) -> None:
    _, archive = llama
    other = model_of("llama")
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    asked = pytest.raises(PlanError, match=rf"(?s)not the model.*{re.escape(str(archive.path))}.*weights: \w+")
    with asked, residua.replay(other, archive, examples=EVEN, at="resid_post.0"):
        pass
    with residua.replay(other, archive, examples=EVEN, at="resid_post.0", force=True) as run:
        assert "force=True" in run.notes[0]
        assert "weights" in run.notes[0]


def test_conditions_that_differ_are_noted(llama: Given, tmp_path: Path) -> None:
    model, archive = llama
    torch.set_num_threads(2)
    try:
        model.set_attn_implementation("eager")  # type: ignore[operator]  # of transformers
        with residua.replay(model, archive, examples=EVEN, at="resid_post.1") as run:
            attention, threads, *_ = run.notes  # more, where the output is rounded otherwise
            assert all(word in attention for word in ("attention", "sdpa", "eager"))
            assert all(word in threads for word in ("threads", "1", "2"))
    finally:
        torch.set_num_threads(1)
        model.set_attn_implementation("sdpa")  # type: ignore[operator]  # of transformers
    half = captured(model_of("llama"), tmp_path / "half", dtype="bfloat16", sites="resid_post.1")
    with residua.replay(model, half, examples=EVEN, at="resid_post.1") as run:
        assert all(word in run.notes[0] for word in ("resid_post.1", "bfloat16", "raw", "float32"))
