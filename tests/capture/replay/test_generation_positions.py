"""Rows and edits keep their positions in generation, however its settings divide the tokens among forward passes.

The expected tokens come from plain hooks on the full model, which runs each example alone and without a cache.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

import residua
from residua.capture.sites.anatomy import anatomy_of
from residua.store.base.errors import CaptureError, PlanError
from tests.capture.manual_hooks import hooked, state_of
from tests.capture.replay.test_edits import HERE, SITE, VECTOR, ByHand, doubled, edits_and_hooks
from tests.capture.replay_samples import EVEN, PADDED, captured, model_of, tokens

N_NEW = 6
ONE_BY_ONE: dict[str, dict[str, Any]] = {
    "a cache": {},
    "no cache": {"use_cache": False},
    "a prompt in chunks": {"prefill_chunk_size": 3},
    "candidates from the prompt": {"prompt_lookup_num_tokens": 3},
    "a static cache": {"cache_implementation": "static"},
}
"""Settings that leave the tokens of greedy generation as they are."""


def endless(name: str) -> PreTrainedModel:
    model = model_of(name)
    model.generation_config.eos_token_id = None
    return model


def block_of(model: PreTrainedModel, number: int) -> nn.Module:
    anatomy = anatomy_of(model)
    assert anatomy is not None
    return anatomy.modules[anatomy.blocks[number]]


def greedy(model: Any, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(N_NEW):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def config_of(**settings: Any) -> GenerationConfig:
    return GenerationConfig(**settings)  # type: ignore[no-untyped-call]  # transformers has no types here


def as_argument_and_in_config(settings: dict[str, Any]) -> list[dict[str, Any]]:
    return [settings, {"generation_config": config_of(eos_token_id=None, **settings)}]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_every_edit_is_placed_whatever_the_settings(name: str, tmp_path: Path) -> None:
    model = endless(name)
    archive = captured(model, tmp_path / "a", sites=f"resid_post.0,{SITE}")
    plain = [greedy(model, tokens()[example]) for example in PADDED]
    before, n_changed = state_of(model), 0

    def by_hand(change: ByHand, example: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden[0, HERE] = change(hidden[0, HERE].clone(), example)

        return hook

    for number, (edit, change) in enumerate(
        edits_and_hooks(archive, doubled(archive, tmp_path / "b", model), tmp_path)
    ):
        expected = []
        for example in PADDED:
            with hooked(block_of(model, 1), by_hand(change, example)):
                expected.append(greedy(model, tokens()[example]))
        n_changed += expected != plain
        options = {**edit, "site": SITE, "positions": "2:5"}
        with residua.replay(model, archive, examples=PADDED, at="resid_post.0", edits=[options]) as run:
            for place, (what, settings) in enumerate(ONE_BY_ONE.items()):
                if place < 3 or name == "llama":
                    given = as_argument_and_in_config(settings)[(place + number) % 2]
                    assert run.generate(N_NEW, **given) == expected, (edit["edit"], what)
    assert n_changed > 8, "the edits change too little for a test"
    assert state_of(model) == before


def scaled(module: nn.Module, positions: slice, *, before: bool = False) -> Any:
    """Return a hand-written hook that scales what enters or leaves a module at some positions."""

    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[:, positions] *= 3
        return tensor

    if before:
        return hooked(module, lambda _m, args: (change(args[0]), *args[1:]), before=True)
    return hooked(module, lambda _m, _a, output: change(output))


MODULES: dict[str, tuple[str, bool]] = {
    "q.1": ("self_attn.q_proj", False),
    "k.1": ("self_attn.k_proj", False),
    "v.1": ("self_attn.v_proj", False),
    "z.1": ("self_attn.o_proj", True),
    "pattern.1": ("self_attn.o_proj", True),
    "mlp_out.1": ("mlp", False),
    "module:model.layers.1.self_attn.k_proj": ("self_attn.k_proj", False),
}
"""From a site to a module of the block, and whether to scale its input: rotation and attention are linear in them."""


KINDS = [*(("llama", site) for site in MODULES), ("mistral", "k.1"), ("mistral", "v.1")]
"""Mistral has a sliding window, whose cache forgets the first keys."""


@pytest.mark.parametrize(("name", "site"), KINDS)
@pytest.mark.parametrize("new", [False, True])
def test_every_kind_of_site_is_placed_in_every_pass(name: str, site: str, new: bool, tmp_path: Path) -> None:
    model = endless(name)
    archive = captured(model, tmp_path / "a", sites="resid_post.0")
    edit = {"edit": "scale", "site": site, "by": 3}
    path, before = MODULES[site]
    model.set_attn_implementation("eager")
    expected = []
    for example in PADDED:
        prompt = tokens()[example]
        with scaled(block_of(model, 1).get_submodule(path), slice(None if new else len(prompt)), before=before):
            expected.append(greedy(model, prompt))
    assert expected != [greedy(model, tokens()[example]) for example in PADDED], "the edit changes nothing"
    with residua.replay(model, archive, examples=PADDED, edits=[edit]) as run:
        for what, settings in ONE_BY_ONE.items():
            assert run.generate(N_NEW, edit_new_tokens=new, **settings) == expected, what


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 2, "use_cache": False}])
@pytest.mark.parametrize("new", [False, True])
def test_every_beam_of_every_example_is_edited(settings: dict[str, Any], new: bool, tmp_path: Path) -> None:
    model = endless("llama")
    archive = captured(model, tmp_path / "a", sites="resid_post.0")
    edit = {"edit": "add", "site": "resid_post.1", "vector": VECTOR, "scale": 5.0}
    vector = 5 * torch.from_numpy(VECTOR).float()
    options: dict[str, Any] = {"max_new_tokens": N_NEW, "do_sample": False, "pad_token_id": 0, **settings}
    expected = []
    for example in PADDED:
        prompt = torch.tensor([tokens()[example]])

        def steer(_module: nn.Module, _args: object, hidden: Tensor, n_prompt: int = prompt.shape[1]) -> Tensor:
            # without a cache every pass begins with the prompt; with one only the first has more than one token
            last = None if new else n_prompt if hidden.shape[1] >= n_prompt else 0
            return torch.cat([hidden[:, :last] + vector, hidden[:, last:] if last is not None else hidden[:, :0]], 1)

        with hooked(block_of(model, 1), steer):
            expected.append(model.generate(prompt, **options)[0, prompt.shape[1] :].tolist())  # type: ignore[operator]
    with residua.replay(model, archive, examples=PADDED, at="resid_post.0", edits=[edit]) as run:
        for given in as_argument_and_in_config(settings):
            assert run.generate(N_NEW, edit_new_tokens=new, **given) == expected


def test_a_model_whose_config_switches_the_cache_off_is_edited_all_the_same(tmp_path: Path) -> None:
    edit = {"edit": "add", "site": "resid_post.1", "vector": VECTOR, "scale": 5.0}
    found = []
    for use_cache in (True, False):
        model = endless("llama")
        model.config.use_cache = use_cache
        model.generation_config.use_cache = use_cache
        archive = captured(model, tmp_path / str(use_cache), sites="resid_post.0")
        with residua.replay(model, archive, examples=PADDED, edits=[edit]) as run:
            found.append(run.generate(N_NEW))
    assert found[0] == found[1]


def test_an_assistant_changes_no_token(tmp_path: Path) -> None:
    model, assistant = endless("llama"), endless("mistral")
    archive = captured(model, tmp_path / "a", sites="resid_post.0")
    edits = [
        {"edit": "add", "site": "resid_post.1", "vector": VECTOR, "scale": 5.0},
        {"edit": "noise", "site": "mlp_out.0", "std": 3.0},
    ]
    with residua.replay(model, archive, examples=PADDED, edits=edits) as run:
        for new in (False, True):
            expected = run.generate(N_NEW, edit_new_tokens=new)
            assert run.generate(N_NEW, edit_new_tokens=new, assistant_model=assistant) == expected
            assert run.generate(N_NEW, edit_new_tokens=new, assistant_model=model) == expected


def test_the_end_and_sampling_are_those_of_the_settings(tmp_path: Path) -> None:
    model = endless("llama")
    archive = captured(model, tmp_path / "a", sites="resid_post.0")
    with residua.replay(model, archive, examples=EVEN, at="resid_post.0") as run:
        first, second = run.generate(N_NEW)
        end = first[2]
        ends: list[dict[str, Any]] = [{"eos_token_id": end}, {"generation_config": config_of(eos_token_id=[end])}]
        for given in ends:
            found = run.generate(N_NEW, **given)
            assert found[0] == first[: first.index(end) + 1]
            assert found[1] == (second[: second.index(end) + 1] if end in second else second)
        config = config_of(do_sample=True, temperature=3.0)
        assert run.generate(N_NEW, seed=1, generation_config=config) == run.generate(
            N_NEW, seed=1, do_sample=True, temperature=3.0
        )
        assert run.generate(N_NEW, generation_config=config) != [first, second]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_return_sequences": 2, "num_beams": 2}, "num_return_sequences"),
    ({"guidance_scale": 2.0}, "guidance_scale"),
    ({"token_healing": True}, "token_healing"),
    ({"return_dict_in_generate": True}, "return_dict_in_generate"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search"),
    ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "group_beam_search"),
]


@pytest.mark.parametrize(("settings", "name"), REFUSED)
def test_settings_without_places_for_the_edits_are_refused_by_name_before_the_model_runs(
    settings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    model = endless("llama")
    archive = captured(model, tmp_path / "a", sites="resid_post.0")
    n_calls: list[int] = []
    with (
        residua.replay(model, archive, examples=EVEN, at="resid_post.0") as run,
        hooked(model, lambda *_: n_calls.append(1)),
    ):
        for settings_given in as_argument_and_in_config(settings):
            with pytest.raises(PlanError, match=name):
                run.generate(2, **settings_given)
        for option in ("input_ids", "attention_mask", "past_key_values"):
            given: dict[str, Any] = {option: torch.ones(1, 1)}
            with pytest.raises(PlanError, match=option):
                run.generate(2, **given)
    assert not n_calls


def test_a_pass_over_other_tokens_is_refused(tmp_path: Path) -> None:
    """Here a user's logits processor runs the model by itself."""
    model = endless("llama")
    archive = captured(model, tmp_path / "a", sites="resid_post.0")

    class Asking(hf.LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            model(input_ids[:, -1:])
            return scores

    with (
        residua.replay(model, archive, examples=EVEN, at="resid_post.0") as run,
        pytest.raises(CaptureError, match="generation ran the model with other tokens"),
    ):
        run.generate(2, logits_processor=hf.LogitsProcessorList([Asking()]))
