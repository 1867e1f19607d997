"""Generation from stored prompts equals running the model again for every token."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

import residua
from residua.capture.sites.anatomy import anatomy_of
from residua.store.base.errors import PlanError
from tests.capture.manual_hooks import hooked, state_of
from tests.capture.replay_samples import EVEN, PADDED, captured, model_of, tokens

N_NEW = 6
VECTOR = torch.linspace(-3, 3, 32)


def greedy(model: nn.Module, prompt: list[int], changes: Callable[[int], slice]) -> list[int]:
    """Generate without a cache; a vector is added to the second block's output at some positions."""
    anatomy = anatomy_of(model)
    assert anatomy is not None
    ids = list(prompt)
    for _ in range(N_NEW):

        def steer(_module: nn.Module, _args: object, hidden: Tensor) -> Tensor:
            hidden[:, changes(len(prompt))] += VECTOR
            return hidden

        with hooked(anatomy.modules[anatomy.blocks[1]], steer), torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:  # the end
            break
    return ids[len(prompt) :]


CHANGES: dict[str, Callable[[int], slice]] = {
    "nothing": lambda _: slice(0, 0),
    "the prompt": lambda n_prompt: slice(0, n_prompt),
    "its third token": lambda _: slice(2, 3),
    "new tokens too": lambda _: slice(None),
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_generation_equals_running_the_model_for_every_token(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    archive = captured(model, tmp_path / "a", sites="resid_post.0")
    before = state_of(model)
    seen = set()
    for what, changes in CHANGES.items():
        edit: dict[str, Any] = {"edit": "add", "site": "resid_post.1", "vector": VECTOR}
        edits = [] if what == "nothing" else [{**edit, "positions": [2]} if "third" in what else edit]
        for examples in (PADDED, [0]):
            with residua.replay(model, archive, examples=examples, at="resid_post.0", edits=edits) as run:
                found = run.generate(N_NEW, edit_new_tokens=what in ("new tokens too", "its third token"))
            assert found == [greedy(model, tokens()[example], changes) for example in examples], what
        seen.add(str(found))
    assert len(seen) > 2, "the edits change too little for a test"
    assert state_of(model) == before


def test_sampling_follows_its_seed_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    model = model_of("llama")
    archive = captured(model, tmp_path / "a", sites="resid_post.0")
    state = torch.random.get_rng_state()
    with residua.replay(model, archive, examples=PADDED, at="resid_post.0") as run:
        first, again, other = (run.generate(8, seed=seed, do_sample=True, temperature=2.0) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_models_and_edits_that_do_not_generate_are_refused(tmp_path: Path) -> None:
    model = model_of("llama")
    archive = captured(model, tmp_path / "a", sites="resid_post.0")
    edit = {"edit": "scale", "site": "logits", "by": 2}
    asked = pytest.raises(PlanError, match=r"logits.*'final'")
    with residua.replay(model, archive, examples=[0], edits=[edit]) as run, asked:
        run.generate(2)
    one_each = pytest.raises(PlanError, match=r"num_return_sequences.*1")
    with residua.replay(model, archive, examples=EVEN, at="resid_post.0") as run, one_each:
        run.generate(2, generation_config=GenerationConfig(do_sample=True, num_return_sequences=2))  # type: ignore[no-untyped-call]
    bert = model_of("bert")
    archive = captured(bert, tmp_path / "b", sites="resid_post.0")
    with (
        residua.replay(bert, archive, examples=[0]) as run,
        pytest.raises(PlanError, match="BertForMaskedLM"),
    ):
        run.generate(2)
