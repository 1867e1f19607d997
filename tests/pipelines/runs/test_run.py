"""`residua.run` compared with plain transformers: logits, sites, edits, generation, gradients, archives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import residua
from residua.capture.identity import fingerprint
from residua.store.base.errors import CaptureError, PlanError, UnknownSiteError
from tests.capture.manual_hooks import state_of
from tests.models.tiny import LAYERS, TINY, VOCABULARY
from tests.pages import ROOT

NAMES = ("gpt2", "llama", "gemma2", "qwen3_moe", "bert")
LENGTHS = (5, 9, 1, 9, 7)
RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(3, VOCABULARY, n).tolist() for n in LENGTHS]
PYDOC = ROOT / "models" / "pydoc-1m"
TEXTS = ["def main():", "The list is sorted in place"]
Outputs = Callable[[list[int]], Any]


def plain(model: PreTrainedModel, ids: list[int]) -> Any:
    """Run the model alone on one prompt, with its hidden states."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), output_hidden_states=True)


def close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch_tokens", [8192, 18])
def test_logits_and_sites_are_those_of_the_model_alone(name: str, batch_tokens: int) -> None:
    model = TINY[name]()
    plain(model, PROMPTS[0])  # transformers attaches hooks of its own for hidden states
    before = state_of(model)
    run = residua.run(model, PROMPTS, sites="resid_post.0, resid_pre.1", batch_tokens=batch_tokens)
    assert run.tokens == PROMPTS
    for place, ids in enumerate(PROMPTS):
        found = plain(model, ids)
        assert close(run.logits[place], found.logits[0])
        assert close(run["resid_post.0"][place], found.hidden_states[1][0])
        assert torch.equal(run["resid_pre.1"][place], run["resid_post.0"][place])
        assert close(run["resid_post.1"][place], found.hidden_states[2][0])  # was not kept
    assert state_of(model) == before


def with_hook(model: PreTrainedModel, module: nn.Module, change: Callable[[Tensor], Tensor], ids: list[int]) -> Tensor:
    def hook(_module: nn.Module, _args: object, output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        return (change(output[0]), *output[1:])

    handle = module.register_forward_hook(hook)
    try:
        logits: Tensor = plain(model, ids).logits[0]
    finally:
        handle.remove()
    return logits


@pytest.mark.parametrize("batch_tokens", [8192, 18])
def test_edits_are_those_of_a_hook_by_hand(batch_tokens: int) -> None:
    model = TINY["llama"]()
    block = model.get_submodule("model.layers.1")
    clean = [plain(model, ids).hidden_states[2][0] for ids in PROMPTS]
    mean = torch.cat(clean).mean(0)

    def zero(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[:, -1] = 0
        return hidden

    def to_mean(hidden: Tensor) -> Tensor:
        return mean.expand_as(hidden)

    def swapped(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[:, -1] = clean[1][-1]
        return hidden

    site = "resid_post.1"
    for edit, change in (
        ({"edit": "zero", "site": site, "positions": [-1]}, zero),
        ({"edit": "mean", "site": site}, to_mean),
        ({"edit": "swap", "site": site, "source": 1, "align": "end", "positions": [-1]}, swapped),
    ):
        run = residua.run(model, PROMPTS, edits=[edit], batch_tokens=batch_tokens)
        for place, ids in enumerate(PROMPTS):
            assert close(run.logits[place], with_hook(model, block, change, ids)), edit
            assert close(run.original_logits[place], plain(model, ids).logits[0])


def test_columns_of_rows_select_edits() -> None:
    model = TINY["gpt2"]()
    rows = [{"input_ids": ids, "label": "even" if n % 2 == 0 else "odd"} for n, ids in enumerate(PROMPTS)]
    run = residua.run(model, rows, edits=[{"edit": "zero", "site": "resid_post.0", "where": {"label": "odd"}}])
    changed = [not close(new, plain(model, ids).logits[0]) for new, ids in zip(run.logits, PROMPTS, strict=True)]
    assert changed == [False, True, False, True, False]


@pytest.mark.parametrize("batch_tokens", [8192, 18])
def test_generation_is_that_of_transformers(batch_tokens: int) -> None:
    model: Any = TINY["llama"]()
    run = residua.run(model, PROMPTS, batch_tokens=batch_tokens)
    for ids, new in zip(PROMPTS, run.generate(max_new_tokens=4), strict=True):
        given = torch.tensor([ids])
        expected = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=4, do_sample=False)
        assert new == expected[0, len(ids) :].tolist()
    edits = [{"edit": "zero", "site": "final"}]  # so that every logit is the same
    silent = residua.run(model, PROMPTS, edits=edits, batch_tokens=batch_tokens)
    assert silent.generate(2, edit_new_tokens=True) == [[0, 0]] * len(PROMPTS)


def test_gradients_are_those_of_autograd() -> None:
    model = TINY["llama"]()
    ids = PROMPTS[1]
    run = residua.run(model, [ids], sites="resid_post.1", grad=True)
    ours = run.gradients({"logit_difference": [5, 6], "position": -1})["resid_post.1"][0]
    states = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    logits = states.logits[0, -1]
    (theirs,) = torch.autograd.grad(logits[5] - logits[6], states.hidden_states[2])
    assert close(ours, theirs[0])
    with pytest.raises(PlanError, match="batch_tokens"):
        residua.run(model, PROMPTS, grad=True, batch_tokens=18)


@pytest.mark.parametrize("edits", [[], [{"edit": "scale", "site": "attn_out.1", "by": 0.5}]], ids=["plain", "edited"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_saved_run_is_an_archive(name: str, edits: list[dict[str, Any]], tmp_path: Path) -> None:
    model = TINY[name]()
    run = residua.run(model, PROMPTS, sites="resid_post.*, z.2", edits=edits, batch_tokens=18)
    archive = run.save(tmp_path / "a.zarr")
    assert residua.verify(archive.path).is_sound
    assert archive.sites == run.sites
    assert archive.rows.example[:].tolist() == np.repeat(range(len(LENGTHS)), LENGTHS).tolist()
    for place, ids in enumerate(PROMPTS):
        assert archive.example_table.tokens(place).tolist() == ids
        for site in run.sites:
            assert torch.equal(torch.from_numpy(archive.example(place, site)[site]), run[site][place])
    recorded: Any = archive.provenance.get("replay")
    assert (recorded and recorded["edits"]) == ([{**edit, "site": [edit["site"]]} for edit in edits] or None)
    with residua.replay(model, archive, examples=[0, 1], at=f"resid_post.{LAYERS - 1}") as again:
        assert close(again.logits[1], run.logits[1])
    if not edits:
        assert residua.reproduce(model, archive.path).is_exact


def test_no_weights_are_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "weights_fingerprint", lambda *_: pytest.fail("weights were hashed"))
    model = TINY["llama"]()
    assert len(residua.run(model, PROMPTS, sites="resid_post.*").logits) == len(PROMPTS)


def test_results_of_another_model_are_refused() -> None:
    model: Any = TINY["llama"]()
    run = residua.run(model, PROMPTS[:1])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    assert run.logits[0].shape == (LENGTHS[0], VOCABULARY)
    with pytest.raises(CaptureError, match="weights have changed"):
        run["resid_post.0"]


SWAP = {"edit": "swap", "site": "resid_post.0", "source": 1, "examples": [0], "positions": [0]}


def test_original_logits_and_rows_of_edits_count_as_host_memory() -> None:
    model, width = TINY["llama"](), TINY["llama"]().config.hidden_size
    n_tokens, size = sum(LENGTHS), model.dtype.itemsize
    needed = n_tokens * size * (VOCABULARY + width)
    edits: list[dict[str, Any]] = [SWAP]
    with pytest.raises(PlanError, match=f"{needed:,} bytes"):
        residua.run(model, PROMPTS, edits=edits, host_memory=needed - 1)
    run = residua.run(model, PROMPTS, edits=edits, host_memory=needed)
    with pytest.raises(PlanError, match=f"{needed + n_tokens * size * VOCABULARY:,} bytes"):
        run.metric("kl")


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        (["a text"], {}, r"tokenizer"),
        ([[{"role": "user", "content": "a chat"}]], {}, r"tokenizer"),
        ([[5, 6], []], {}, r"prompt 1 is empty"),
        ([], {}, r"no prompt"),
        ([[5, 6], "a text"], {}, r"prompt 1 is a text.*prompt 0 a list of token ids"),
        ([[5, 6], [{"role": "user", "content": "a chat"}]], {}, r"prompt 1 is a chat"),
        ([[5, 6], None], {}, r"prompt 1 is None"),
        ([1.5], {}, r"prompt 0 is 1\.5"),
        ([[5] * 65], {}, r"65 tokens.*takes 64"),
        (PROMPTS, {"sites": "resid_post.*", "host_memory": 10_000}, r"host_memory.*10,000"),
        (PROMPTS, {"edits": [SWAP], "host_memory": 1_000}, r"edits take.*host_memory.*1,000"),
        (PROMPTS, {"edits": [{"edit": "zero", "site": "final", "positions": [9]}]}, r"edit 1.*position 9.*9 tokens"),
        (PROMPTS, {"edits": [{"edit": "zero", "site": "final", "examples": [5]}]}, r"edit 1.*example 5.*run has 5"),
        (PROMPTS, {"edits": [{"edit": "zero", "site": "final", "tokens": [1]}]}, r"edit 1.*changes nothing"),
        (PROMPTS, {"edits": [{"edit": "swap", "site": "final", "source": 7}]}, r"edit 1.*example 7"),
        (PROMPTS, {"batch_tokens": 0}, r"batch_tokens=0"),
    ],
)
def test_bad_input_is_refused_before_the_model_runs(prompts: Any, options: dict[str, Any], words: str) -> None:
    model = TINY["llama"]()

    def refuse(_module: nn.Module, _args: object, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"]  # a run over a few tokens of its own may find out how the model takes padding
        assert not any(ids[0].tolist()[:2] == prompt[:2] for prompt in PROMPTS), "the model ran"

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    with pytest.raises(PlanError, match=words):
        residua.run(model, prompts, **options)


def test_unknown_sites_are_refused() -> None:
    with pytest.raises(UnknownSiteError, match=r"resid_post\.9"):
        residua.run(TINY["llama"](), PROMPTS, sites="resid_post.9")


@pytest.fixture(scope="module")
def pydoc() -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(PYDOC).train(False), AutoTokenizer.from_pretrained(PYDOC)


def test_texts_are_tokenized_and_given_back(pydoc: tuple[Any, Any]) -> None:
    model, tokenizer = pydoc
    run = residua.run(model, TEXTS)  # finds the tokenizer where the model came from
    by_name = residua.run(PYDOC, TEXTS[0], device="cpu")
    assert by_name.tokens[:1] == run.tokens[:1]
    assert run.tokens == tokenizer(TEXTS)["input_ids"]
    assert [run.text(place) for place in range(2)] == TEXTS
    encoded = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right") if tokenizer.pad_token else None
    if encoded is not None:
        assert residua.run(model, encoded).tokens == run.tokens
    columns = {"text": TEXTS, "label": ["a", "b"]}
    for same in (columns, pd.DataFrame(columns), pd.Series(TEXTS), pa.table(columns)):
        assert residua.run(model, same).tokens == run.tokens
    for same in (run.tokens, [torch.tensor(ids) for ids in run.tokens], [{"text": text} for text in TEXTS]):
        assert residua.run(model, same).tokens == run.tokens


def test_the_table_has_a_line_for_each_token(pydoc: tuple[Any, Any]) -> None:
    model, tokenizer = pydoc
    lines = residua.run(model, TEXTS, tokenizer=tokenizer).table().to_pylist()
    for example, text in enumerate(TEXTS):
        ids = tokenizer(text)["input_ids"]
        mine = [line for line in lines if line["example"] == example]
        assert [(line["position"], line["token"]) for line in mine] == list(enumerate(ids))
        assert "".join(line["text"] for line in mine) == text
        logits = plain(model, ids).logits[0]
        assert [line["top"] for line in mine] == logits.argmax(-1).tolist()
        losses = nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        assert mine[-1]["loss"] is None
        np.testing.assert_allclose([line["loss"] for line in mine[:-1]], losses, rtol=1e-4)
    assert {line["text"] for line in residua.run(TINY["llama"](), PROMPTS).table().to_pylist()} == {None}


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("llama", ("blocks.1.hook_resid_post", "model.layers.1", "model.model.layers[1].output[0]")),
        ("gpt2", ("blocks.1.hook_resid_post", "transformer.h[1].output", "model.transformer.h.1.output[0]")),
    ],
)
def test_names_of_other_libraries_name_the_same_rows(name: str, paths: tuple[str, ...]) -> None:
    model = TINY[name]()
    run = residua.run(model, PROMPTS[:2], sites=paths[0])
    assert run.sites == ("resid_post.1",)
    expected = plain(model, PROMPTS[1]).hidden_states[2][0]
    for path in paths:
        assert close(run[path][1], expected)
    edited = residua.run(model, PROMPTS[:2], edits=[{"edit": "zero", "site": paths[1]}], sites="resid_post.1")
    assert not edited["resid_post.1"][1].any()
    mlp = "model.layers[1].mlp.output" if name == "llama" else "model.transformer.h[1].mlp.output"
    assert close(run[mlp][1], run["mlp_out.1"][1])
