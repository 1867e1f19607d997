"""Edits of q, k, v and z against a function that replaces transformers' attention."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

import residua
from tests.capture.manual_hooks import hooked
from tests.capture.replay_samples import LENGTHS, PADDED, captured, model_of, run_in_full

FIRST = 3  # positions that are edited
HEAD, CHANNELS = 1, [0, 3]
Change = Callable[[Tensor], Tensor]
"""From the rows of an example at the edited positions, (3, heads, head width), to what they become."""


@contextmanager
def attention_by_hand(layer: int, changes: dict[str, Change]) -> Iterator[None]:
    """Change the inputs and the output of the attention of one block."""
    table = AttentionInterface._global_mapping
    own = table["sdpa"]

    def changed(name: str, rows_BTHD: Tensor) -> Tensor:
        new = rows_BTHD.clone()
        for place, example in enumerate(PADDED) if name in changes else ():
            here = slice(min(FIRST, LENGTHS[example]))
            new[place, here] = changes[name](new[place, here].clone())
        return new

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module.layer_idx != layer:
            return own(module, query, key, value, *args, **kwargs)
        pairs = zip("qkv", (query, key, value), strict=True)
        taken = [changed(name, rows.transpose(1, 2)).transpose(1, 2) for name, rows in pairs]
        mixed, weights = own(module, *taken, *args, **kwargs)
        return changed("z", mixed), weights

    table["sdpa"] = attend
    try:
        yield
    finally:
        table["sdpa"] = own


def test_edits_of_patterns_run_with_eager_attention_on_both_sides(tmp_path: Path) -> None:
    """A head with weights 0 contributes nothing; unchanged weights change nothing."""
    model = model_of("gpt2", torch.bfloat16)
    archive = captured(model, tmp_path / "a", sites="resid_post.0,logits")

    def without_head(_module: object, inputs: tuple[Tensor]) -> tuple[Tensor]:
        mixed = inputs[0].clone()
        mixed[..., 8:16] = 0
        return (mixed,)

    model.set_attn_implementation("eager")
    with hooked(model.get_submodule("transformer.h.1.attn.c_proj"), without_head, before=True):
        expected, is_token = run_in_full(model, archive, PADDED)
    model.set_attn_implementation("sdpa")
    zero: dict[str, Any] = {"edit": "zero", "site": "pattern.1", "heads": [1]}
    same: dict[str, Any] = {"edit": "scale", "site": "pattern.*", "by": 1}
    with residua.replay(model, archive, examples=PADDED, edits=[zero]) as run:
        (note,) = run.notes
        assert all(word in note for word in ("pattern.1", "eager", "sdpa"))
        for place in range(len(PADDED)):
            assert torch.equal(run.logits[place], expected[place][is_token[place]])
            assert not torch.equal(run.logits[place], run.original_logits[place])
    with residua.replay(model, archive, examples=PADDED, edits=[same]) as run:
        for new, old in zip(run.logits, run.original_logits, strict=True):
            assert torch.equal(new, old)
    with residua.replay(model, archive, examples=PADDED, keep="pattern.1") as run:
        (note,) = run.notes
        assert all(word in note for word in ("pattern.1", "eager", "sdpa"))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.bfloat16),
        ("gpt2", torch.float32),
        ("gemma3", torch.float16),
        ("phi", torch.bfloat16),
        ("gemma4", torch.float32),
    ],
)
def test_edits_of_heads_are_what_a_function_by_hand_does(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of(name, dtype)
    archive = captured(model, tmp_path / "a", sites="resid_post.0,q.1,v.1,logits")
    added = np.random.default_rng(5).standard_normal(archive.plan.site("q.1").row_shape)
    value = np.random.default_rng(6).standard_normal(archive.plan.site("v.1").row_shape)

    def in_head(x: Tensor) -> Tensor:
        x[:, HEAD] += torch.from_numpy(added[HEAD]).to(dtype)
        return x

    def in_channels(x: Tensor) -> Tensor:
        x[..., CHANNELS] *= -1.5
        return x

    def without_head(x: Tensor) -> Tensor:
        x[:, HEAD] = 0
        return x

    cases: dict[str, tuple[dict[str, Any], Change]] = {
        "z": ({"edit": "zero", "heads": [HEAD]}, without_head),
        "v": ({"edit": "set", "to": value}, lambda x: torch.from_numpy(value).to(dtype).expand_as(x)),
        "k": ({"edit": "scale", "by": -1.5, "channels": CHANNELS}, in_channels),
        "q": ({"edit": "add", "vector": added, "heads": [HEAD]}, in_head),
    }
    plain, is_token = run_in_full(model, archive, PADDED)
    for kinds in (*cases, "zvkq"):
        with attention_by_hand(1, {kind: cases[kind][1] for kind in kinds}):
            expected, _ = run_in_full(model, archive, PADDED)
        assert not torch.equal(expected, plain), f"{kinds}: changes nothing: no test"
        edits = [{**cases[kind][0], "site": f"{kind}.1", "positions": f":{FIRST}"} for kind in kinds]
        with residua.replay(model, archive, examples=PADDED, at="resid_post.0", edits=edits) as run:
            for place in range(len(PADDED)):
                assert torch.equal(run.logits[place], expected[place][is_token[place]]), kinds
