"""Patching cell by cell against plain hooks, and its estimate where the effect is linear."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow.parquet import read_table
from torch import Tensor, nn

import residua
from residua.pipelines.cli.main import main
from residua.store.base.errors import PlanError, UnknownSiteError
from tests.capture.replay_samples import captured, model_of, tokens
from tests.ragged import MODEL

CLEAN, CORRUPTED = (3, 9, 27, 81, 5, 15, 45), (3, 9, 30, 81, 5, 15, 45)
PAIR = {"clean": list(CLEAN), "corrupted": list(CORRUPTED), "answer": 7, "wrong": 11}
MODULES = {"llama": "model.layers.{}", "gpt2": "transformer.h.{}"}


def run(model: nn.Module, ids: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids])).logits[0, -1].double()
    return logits


def by_hand(name: str, layer: int, position: int) -> Tensor:
    """Return the corrupted example's logits with the clean output of one block at one position."""
    model, kept = model_of(name), list[Tensor]()
    block = model.get_submodule(MODULES[name].format(layer))
    handle = block.register_forward_hook(lambda _m, _i, output: kept.append(output.clone()))
    run(model, CLEAN)
    handle.remove()

    def put_in(_module: object, _inputs: object, output: Tensor) -> Tensor:
        new = output.clone()
        new[:, position] = kept[0][:, position]
        return new

    handle = block.register_forward_hook(put_in)
    logits = run(model, CORRUPTED)
    handle.remove()
    return logits


def measured(logits: Tensor, clean: Tensor, metric: str) -> float:
    log_q, log_p = logits.log_softmax(-1), clean.log_softmax(-1)
    values = {
        "logit_difference": logits[7] - logits[11],
        "loss": -log_q[7],
        "probability": log_q[7].exp(),
        "kl": (log_p.exp() * (log_p - log_q)).sum(),
    }
    return float(values[metric])


@pytest.mark.parametrize("metric", ["logit_difference", "loss", "probability", "kl"])
@pytest.mark.parametrize("name", MODULES)
def test_every_cell_equals_the_one_of_plain_hooks(name: str, metric: str) -> None:
    model = model_of(name)
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    found = residua.patch(model, [PAIR], metric=metric, batch_cells=8).to_pylist()
    handle.remove()
    assert len(calls) == 2 + 3, "21 cells take three passes of eight"
    clean, corrupted = (measured(run(model, ids), run(model, CLEAN), metric) for ids in (CLEAN, CORRUPTED))
    assert [(line["site"], line["position"]) for line in found] == [
        (f"resid_post.{layer}", position) for layer in range(3) for position in range(7)
    ]
    for line in found:
        layer, position = int(line["site"][-1]), line["position"]
        expected = measured(by_hand(name, layer, position), run(model, CLEAN), metric)
        assert line["value"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert line["effect"] == pytest.approx(expected - corrupted, rel=1e-3, abs=2e-5)
        assert line["recovered"] == pytest.approx((expected - corrupted) / (clean - corrupted), rel=1e-3, abs=2e-3)
        assert line["token"] == CORRUPTED[position]
    assert found[-1]["recovered"] == pytest.approx(1, abs=1e-3), "the last position of the last block decides alone"
    assert found[0]["effect"] == pytest.approx(0, abs=2e-5), "before the difference there is no effect"


@pytest.mark.parametrize("name", MODULES)
def test_the_blocks_below_the_cells_of_a_pass_run_once_for_all(name: str) -> None:
    """Each pass has other cells, so that one starts at each block; a grid in which all sites share a pass agrees."""
    model, sites = model_of(name), "resid_pre.1,attn_out.1,mlp_out.1,resid_post.1,mlp_out.2,resid_post.2,final"
    calls = dict.fromkeys(range(3), 0)

    def count(layer: int) -> None:
        calls[layer] += 1

    blocks = [model.get_submodule(MODULES[name].format(layer)) for layer in range(3)]
    inside = [block.get_submodule("mlp") for block in blocks]
    handles = [mlp.register_forward_hook(lambda *_, n=n: count(n)) for n, mlp in enumerate(inside)]
    found = residua.patch(model, [PAIR], sites=sites, batch_cells=7)
    for handle in handles:
        handle.remove()
    assert calls == {0: 2 + 1, 1: 2 + 4, 2: 2 + 5 + 1}, "two runs in full; `final` starts nowhere"
    together = residua.patch(model, [PAIR], sites=f"embed,{sites}", batch_cells=100).slice(7)
    np.testing.assert_allclose(found["value"].to_numpy(), together["value"].to_numpy(), rtol=1e-4, atol=1e-5)
    post = {line["position"]: line["value"] for line in found.to_pylist() if line["site"] == "resid_post.1"}
    for position in (2, 6):
        expected = measured(by_hand(name, 1, position), run(model, CLEAN), "logit_difference")
        assert post[position] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert not any("forward" in vars(block) for block in blocks), "the blocks are as they were"


def test_a_pass_that_is_large_enough_ends_where_the_next_can_start_higher() -> None:
    model, n_tokens = model_of("llama"), 40
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 90, n_tokens).tolist()
    pair = {**PAIR, "clean": ids, "corrupted": [*ids[:5], ids[5] + 1, *ids[6:]]}
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    positions = [5, 6, 7, 8, 9, 10, -1]
    found = residua.patch(model, [pair], sites="mlp_out.*", positions=positions)
    assert len(calls) == 2 + 3, "seven copies of 40 tokens are enough for a pass, and no block shares one"
    alone = residua.patch(model, [pair], sites="mlp_out.*", positions=positions, batch_cells=1)
    handle.remove()
    np.testing.assert_allclose(found["value"].to_numpy(), alone["value"].to_numpy(), rtol=1e-4, atol=1e-5)


def heads_by_hand(layer: int, head: int, where: slice | int) -> Tensor:
    """Return the corrupted example's logits with the clean output of one head."""
    model, kept, width = model_of("llama"), list[Tensor](), 8
    projection = model.get_submodule(f"model.layers.{layer}.self_attn.o_proj")
    handle = projection.register_forward_pre_hook(lambda _m, inputs: kept.append(inputs[0].clone()))
    run(model, CLEAN)
    handle.remove()

    def put_in(_module: object, inputs: tuple[Tensor]) -> tuple[Tensor]:
        new, columns = inputs[0].clone(), slice(head * width, (head + 1) * width)
        new[:, where, columns] = kept[0][:, where, columns]
        return (new,)

    handle = projection.register_forward_pre_hook(put_in)
    logits = run(model, CORRUPTED)
    handle.remove()
    return logits


@pytest.mark.parametrize("positions", ["together", [2, -1]])
def test_every_head_equals_the_one_of_plain_hooks(positions: Any, tmp_path: Path) -> None:
    model = model_of("llama")
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    options: dict[str, Any] = {"sites": "z.*", "heads": True, "positions": positions}
    found = residua.patch(model, [PAIR], batch_cells=8, out=tmp_path, **options).to_pylist()
    handle.remove()
    places = [None] if positions == "together" else [2, 6]
    assert len(calls) == 2 + (2 if places == [None] else 3), "12 or 24 cells, eight a pass"
    assert [(line["site"], line["position"], line["head"]) for line in found] == [
        (f"z.{layer}", place, head) for layer in range(3) for place in places for head in range(4)
    ]
    for line in found:
        where = slice(None) if line["position"] is None else line["position"]
        logits = heads_by_hand(int(line["site"][-1]), line["head"], where)
        assert line["value"] == pytest.approx(float(logits[7] - logits[11]), rel=1e-4, abs=1e-5)
        assert line["token"] == (None if line["position"] is None else CORRUPTED[line["position"]])
    assert max(abs(line["effect"]) for line in found) > 1e-2
    assert (tmp_path / "cells.png").stat().st_size > 5_000


def test_estimates_of_heads_and_of_all_positions_add_up() -> None:
    """The estimate of a row is the sum over its heads, and that of all positions the sum over positions."""
    model = model_of("gpt2")
    whole = residua.attribute(model, [PAIR], sites="z.1").to_pandas()
    heads = residua.attribute(model, [PAIR], sites="z.1", heads=True).to_pandas()
    together = residua.attribute(model, [PAIR], sites="z.1", heads=True, positions="together").to_pandas()
    assert heads.groupby("position")["effect"].sum().tolist() == pytest.approx(whole["effect"].tolist(), abs=1e-9)
    assert together["effect"].tolist() == pytest.approx(heads.groupby("head")["effect"].sum().tolist(), abs=1e-9)
    assert whole["effect"].abs().max() > 1e-3


@pytest.mark.parametrize("name", MODULES)
def test_the_estimate_is_exact_where_the_metric_is_linear(name: str) -> None:
    model = model_of(name)
    head = "module:lm_head@input"
    found, true = (way(model, [PAIR], sites=head).to_pylist() for way in (residua.attribute, residua.patch))
    assert [line["value"] for line in found] == pytest.approx([line["value"] for line in true], rel=1e-4, abs=1e-4)
    assert abs(true[-1]["effect"]) > 1e-2


def test_the_estimate_is_the_slope_of_true_patching() -> None:
    """Compare other sites with central differences on the way from corrupted to clean, in float64."""
    model = model_of("gpt2", torch.float64)  # others compute norms in float32
    found = residua.attribute(model, [PAIR], sites="resid_post.0,mlp_out.1,z.2", metric="loss", positions=[2, 4, -1])
    for line in found.to_pylist():
        site, position = line["site"], line["position"]
        values: dict[str, dict[str, Tensor]] = {"clean": {}, "corrupted": {}}
        for word, ids in (("clean", CLEAN), ("corrupted", CORRUPTED)):
            with residua.tap(model, site, values[word].__setitem__):
                run(model, ids)
        step = (values["clean"][site] - values["corrupted"][site])[0, position]

        def loss(size: float, site: str = site, position: int = position, step: Tensor = step) -> float:
            def move(_site: str, tensor: Tensor) -> Tensor:
                tensor[0, position] += size * step
                return tensor

            with residua.tap(model, site, move):
                return float(-run(model, CORRUPTED).log_softmax(-1)[7])

        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
        assert line["effect"] == pytest.approx(slope, rel=1e-5, abs=1e-8), (site, position)
    assert set(found["site"].to_pylist()) == {"resid_post.0", "mlp_out.1", "z.2"}
    assert all(parameter.grad is None for parameter in model.parameters())


CIRCUIT = [("attn_out.1", 8), ("attn_out.3", 19)]
"""The previous-token heads write at the answer's first copy; the induction heads read it at the last position."""


def repeats(n_pairs: int) -> list[dict[str, Any]]:
    """Return pairs of a repeated random block; in the corrupted example another token precedes the answer."""
    rng = np.random.default_rng(11)
    pairs = []
    for _ in range(n_pairs):
        block = rng.choice(np.arange(3, 1024), 14, replace=False).tolist()
        block, (other, wrong) = block[:12], block[12:]
        clean = [0, *block, *block[:7]]
        corrupted = [0, *block[:6], other, *block[7:], *block[:7]]
        pairs.append({"clean": clean, "corrupted": corrupted, "answer": block[7], "wrong": wrong})
    return pairs


def test_the_induction_layer_of_the_shipped_model_stands_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(pair) for pair in repeats(6)))
    words = ["--model", str(MODEL), "--pairs", str(file), "--sites", "attn_out.*"]
    assert main(["patch", *words, "--out", str(tmp_path / "patched")]) == 0
    assert "recovered" in capsys.readouterr().out
    assert (tmp_path / "patched/cells.png").stat().st_size > 10_000
    found = read_table(tmp_path / "patched/cells.parquet").to_pandas()
    mean = found.groupby(["site", "position"])["recovered"].mean()
    assert all(mean[cell] > 0.9 for cell in CIRCUIT)
    assert mean.drop(CIRCUIT).abs().max() < 0.4
    by_head = [*words[:-1], "z.*", "--heads", "--positions", "together", "--out", str(tmp_path / "heads")]
    assert main(["patch", *by_head]) == 0
    assert "all" in capsys.readouterr().out
    heads = read_table(tmp_path / "heads/cells.parquet").to_pandas().groupby("site")["recovered"].mean()
    assert set(heads.nlargest(2).index) == {"z.1", "z.3"}
    assert main(["attribute", *words, "--out", str(tmp_path / "attributed"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n_cells"] == len(found)
    estimated = read_table(tmp_path / "attributed/cells.parquet").to_pandas()
    estimate = estimated.groupby(["site", "position"])["recovered"].mean()
    assert set(estimate.abs().nlargest(2).index) == set(CIRCUIT)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = model_of("llama")
    archive = captured(model, tmp_path / "a", sites="resid_post.0")
    named = [{"clean": 0, "corrupted": 1, "answer": 7, "wrong": 8}]
    with_ids = [{**named[0], "clean": tokens()[0], "corrupted": tokens()[1]}]
    options: dict[str, Any] = {"sites": "resid_post.1", "positions": [-1]}
    assert residua.patch(model, named, archive=archive, **options) == residua.patch(model, with_ids, **options)
    for pairs, more, message in (
        (named, {}, "pair 1: .*example 0.*archive="),
        ([{**PAIR, "clean": [1, 2]}], {}, "pair 1: .*2 clean.*7 corrupted"),
        ([PAIR, {**PAIR, "answer": 97}], {}, "pair 2: .*token 97"),
        ([{**PAIR, "clean": "text"}], {}, "pair 1: .*tokenizer"),
        ([{**PAIR, "wrong": None}], {}, "wrong"),
        ([PAIR], {"positions": [7]}, "pair 1 .*7 tokens.*position 7"),
        ([PAIR], {"metric": "luck"}, "'luck'.*logit_difference"),
        ([PAIR], {"batch_cells": 0}, "batch_cells=.*0"),
        ([PAIR], {"positions": "all"}, "'all'.*together"),
        ([PAIR], {"sites": "resid_post.0", "heads": True}, r"resid_post\.0.*heads"),
        ([PAIR], {"sites": "pattern.0"}, r"pattern\.0"),
        ([], {}, "pairs"),
        ([3], {}, "pair 1: .*clean, corrupted and answer"),
        (tmp_path / "no.jsonl", {}, r"no\.jsonl"),
    ):
        with pytest.raises(PlanError, match=message):
            residua.patch(model, pairs, **{**options, **more})  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(UnknownSiteError):
        residua.attribute(model, [PAIR], sites="resid_post.9")
