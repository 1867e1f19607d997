"""The full job, against transformers' own hidden states in batches that the format page alone defines."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import residua
from tests.models.tiny import LAYERS, TINY
from tests.pipelines.small_capture import BATCH_TOKENS, HEIGHT, LENGTHS, capture, embedding_of
from tests.plain_zarr import plain_array


def batches_by_the_format_page(lengths: list[int]) -> Iterator[list[int]]:
    """Yield the examples of each batch as store/FORMAT.md defines them, from lengths alone (all positions kept)."""
    first_row = np.concatenate([[0], np.cumsum(lengths)])
    for shard in range(-(-int(first_row[-1]) // HEIGHT)):
        group = [i for i in range(len(lengths)) if first_row[i] // HEIGHT == shard]
        group.sort(key=lambda i: -lengths[i])
        while group:
            n = max(1, BATCH_TOKENS // lengths[group[0]])
            yield group[:n]
            group = group[n:]


def hidden_states(model: PreTrainedModel, tokens: list[list[int]]) -> list[torch.Tensor]:
    """Return transformers' hidden states, layer by layer, as (rows, width), in batches as captured."""
    per_example: dict[int, list[torch.Tensor]] = {}
    for batch in batches_by_the_format_page([len(ids) for ids in tokens]):
        longest = max(len(tokens[i]) for i in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for b, i in enumerate(batch):
            ids[b, : len(tokens[i])] = torch.tensor(tokens[i])
            mask[b, : len(tokens[i])] = 1
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            output = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True, use_cache=False
            )
        for b, i in enumerate(batch):
            per_example[i] = [layer[b, : len(tokens[i])] for layer in output.hidden_states]
    return [torch.cat([per_example[i][layer] for i in range(len(tokens))]) for layer in range(LAYERS)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("codec", ["raw", "fast", "small"])
def test_rows_are_the_hidden_states_bit_for_bit(name: str, codec: str, tokens: list[list[int]], tmp_path: Path) -> None:
    model = TINY[name]()
    expected = hidden_states(model, tokens)
    archive = capture(model, tokens, tmp_path / "a.zarr", sites="resid_pre.*", codec=codec).archive
    assert archive.is_sealed
    assert archive.n_rows == sum(LENGTHS)
    for layer in range(LAYERS):
        stored = archive[f"resid_pre.{layer}"]
        assert torch.equal(stored.torch(), expected[layer])
        assert np.array_equal(plain_array(archive.path, f"sites/resid_pre/{layer}"), expected[layer].numpy())


def test_bfloat16_is_torchs_rounding(llama: PreTrainedModel, tokens: list[list[int]], tmp_path: Path) -> None:
    archive = capture(llama, tokens, tmp_path / "a.zarr", sites="resid_pre.1", dtype="bfloat16").archive
    stored = archive["resid_pre.1"].torch()
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored, hidden_states(llama, tokens)[1].to(torch.bfloat16))


def test_row_columns_say_what_each_row_is(llama: PreTrainedModel, tokens: list[list[int]], tmp_path: Path) -> None:
    archive = capture(llama, tokens, tmp_path / "a.zarr", sites="embed").archive
    assert archive.rows.token[...].tolist() == [token for ids in tokens for token in ids]
    assert archive.rows.position[...].tolist() == [i for ids in tokens for i in range(len(ids))]
    assert archive.rows.example[...].tolist() == [i for i, ids in enumerate(tokens) for _ in ids]
    table = archive.examples.to_pydict()
    assert table["input_ids"] == tokens
    assert table["n_tokens"] == list(LENGTHS)
    embedding = embedding_of(llama)[torch.from_numpy(archive.rows.token[...]).long()]
    assert torch.equal(archive["embed"].torch(), embedding.detach())


@pytest.mark.parametrize(
    ("rule", "kept"),
    [("last", lambda n: [n - 1]), ("every:4", lambda n: list(range(0, n, 4))), ("all", lambda n: list(range(n)))],
)
def test_position_rules_choose_rows(
    rule: str, kept: Any, llama: PreTrainedModel, tokens: list[list[int]], tmp_path: Path
) -> None:
    full = capture(llama, tokens, tmp_path / "all.zarr", sites="resid_post.1", rows_per_shard=1024).archive
    some = capture(
        llama, tokens, tmp_path / "some.zarr", sites="resid_post.1", rows_per_shard=1024, positions=rule
    ).archive
    first = np.cumsum([0, *LENGTHS])
    rows = [int(first[i]) + p for i, n in enumerate(LENGTHS) for p in kept(n)]
    assert np.array_equal(some["resid_post.1"][...], full["resid_post.1"][rows])


def test_example_returns_the_rows_of_every_site(
    llama: PreTrainedModel, tokens: list[list[int]], tmp_path: Path
) -> None:
    archive = capture(llama, tokens, tmp_path / "a.zarr", sites="resid_post.*,q.0,pattern.1,logits_top3").archive
    found = archive.example(6)
    assert found["resid_post.2"].shape == (40, 32)
    assert found["q.0"].shape == (40, 4, 8)
    assert found["pattern.1"].shape == (40, 4, 40)
    assert np.allclose(found["pattern.1"].sum(-1), 1, atol=1e-6)
    assert found["logits_top3.indices"].dtype == np.int32
    short = archive.example(4)["pattern.1"]
    assert not short[..., 2:].any(), "entries past an example's end are zero"


def test_nan_and_infinity_are_kept_and_counted(tokens: list[list[int]], tmp_path: Path) -> None:
    model = TINY["llama"]()
    token = tokens[3][0]
    with torch.no_grad():
        embedding_of(model)[token, 0] = torch.nan
        embedding_of(model)[token, 1] = torch.inf
    result = capture(model, tokens, tmp_path / "a.zarr", sites="embed", dtype="bfloat16")
    occurrences = sum(ids.count(token) for ids in tokens)
    assert result.stats.n_nonfinite["sites/embed"] == 2 * occurrences
    rows = np.flatnonzero(result.archive.rows.token[...] == token)
    kept = result.archive["embed"].torch(rows)
    assert kept[:, 0].isnan().all()
    assert kept[:, 1].isposinf().all()


def test_the_users_columns_come_along(llama: PreTrainedModel, tmp_path: Path) -> None:
    data = [{"input_ids": [5, 6, 7], "label": "cat"}, {"input_ids": [8, 9], "label": "dog"}]
    archive = capture(llama, data, tmp_path / "a.zarr", sites="resid_post.0").archive
    assert archive.examples.column("label").to_pylist() == ["cat", "dog"]


def test_the_model_is_left_as_it_was(llama: PreTrainedModel, tokens: list[list[int]], tmp_path: Path) -> None:
    hooks = [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in llama.named_modules()]
    before = llama.config._attn_implementation
    capture(llama, tokens, tmp_path / "a.zarr", sites="pattern.*,resid_post.*")
    assert hooks == [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in llama.named_modules()]
    assert llama.config._attn_implementation == before


def test_nothing_is_computed_that_no_site_needs(tokens: list[list[int]], tmp_path: Path) -> None:
    model = TINY["llama"]()
    full = capture(model, tokens, tmp_path / "full.zarr", sites="resid_post.*,logits").archive
    ran: list[str] = []
    for name in ("model.layers.1", "model.layers.2", "lm_head"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    some = capture(
        model, tokens, tmp_path / "some.zarr", sites="resid_post.0-1", on_plan=lambda *_: ran.clear()
    ).archive
    assert set(ran) == {"model.layers.1"}
    assert torch.equal(some["resid_post.1"].torch(), full["resid_post.1"].torch())


def test_opening_is_lazy_and_public(llama: PreTrainedModel, tokens: list[list[int]], tmp_path: Path) -> None:
    capture(llama, tokens, tmp_path / "a.zarr", sites="resid_post.*")
    archive = residua.open(tmp_path / "a.zarr")
    assert archive.sites == ("resid_post.0", "resid_post.1", "resid_post.2")
    assert archive["resid_post.0"].shape == (sum(LENGTHS), 32)


def test_a_model_in_training_mode_is_captured_without_dropout(tokens: list[list[int]], tmp_path: Path) -> None:
    model = TINY["gpt2"]()
    expected = capture(model, tokens, tmp_path / "a.zarr", sites="resid_post.*").archive
    model.config.resid_pdrop = 0.5
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train(True)
    found = capture(model, tokens, tmp_path / "b.zarr", sites="resid_post.*").archive
    assert model.training
    assert torch.equal(found["resid_post.2"].torch(), expected["resid_post.2"].torch())


def test_what_prints_of_a_capture_is_one_short_line(
    llama: PreTrainedModel, tokens: list[list[int]], tmp_path: Path
) -> None:
    result = capture(llama, tokens, tmp_path / "a.zarr", sites="resid_post.*")
    archive, n_rows = result.archive, sum(LENGTHS)
    assert repr(result).startswith(f"<CaptureResult {archive.path}: {n_rows} rows captured in ")
    assert repr(archive.plan) == f"<Plan {archive.plan.digest[:12]}: 3 sites, {n_rows} rows in shards of 16>"
    assert repr(archive.example_table) == f"<ExampleTable {archive.path}/examples of {len(LENGTHS)} examples>"
    loader = archive.loader("resid_post.1", batch_size=8)
    assert repr(loader) == f"<Loader of resid_post.1 from {archive.path} in batches of 8 rows>"
    with residua.tap(llama, "resid_post.*", lambda *_: None) as taps:
        taps.enabled = False
        assert repr(taps) == "<Tap of resid_post.0, resid_post.1, resid_post.2, switched off>"
    found = residua.reproduce(llama, archive.path)
    assert repr(found).endswith("every row is equal bit for bit>")
    with residua.replay(llama, archive, examples=range(len(LENGTHS)), at="resid_post.0") as run:
        assert repr(run) == f"<Run of examples 0, 1, 2, 3, 4 and 9 more of {archive.path}>"
