"""Loops that go on with a cache, and ``generate``: rows are those of a plain forward over the full sequences."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor

import residua
from residua.store.base.errors import CaptureError
from residua.store.verification.verify import verify
from tests.models.tiny import TINY

PROMPTS = ([5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [20, 21])
N_NEW = 7
END = 2
SITES = "resid_post.*,k.1,v.1"


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Any:
    found: Any = TINY[getattr(request, "param", "llama")]().double()
    return found


def left_padded(prompts: Any = PROMPTS) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def check(model: Any, archive: residua.Archive, *, n_without_rows: int) -> list[dict[str, Any]]:
    """Compare rows with a forward of each example alone, and return the examples."""
    examples: list[dict[str, Any]] = archive.example_table.table().to_pylist()
    assert verify(archive.path).problems == []
    for number, example in enumerate(examples):
        n_rows = len(example["input_ids"]) - n_without_rows
        assert example["positions"] == list(range(n_rows))
        start, stop = archive.example_table.rows(number)
        assert archive.rows.token[start:stop].tolist() == example["input_ids"][:n_rows]
        with torch.no_grad():
            full = model(torch.tensor([example["input_ids"]]), output_hidden_states=True, use_cache=True)
        layer = full.past_key_values.layers[1]
        expected = {"resid_post.0": full.hidden_states[1][0], "resid_post.1": full.hidden_states[2][0]}
        if not getattr(layer, "is_sliding", False):  # such a cache forgets what lies before
            expected |= {
                name: getattr(layer, what)[0].transpose(0, 1) for name, what in (("k.1", "keys"), ("v.1", "values"))
            }
        for site, rows in expected.items():
            np.testing.assert_allclose(
                np.asarray(archive[site][start:stop], np.float64), rows[:n_rows].numpy(), rtol=1e-8, atol=1e-8
            )
    return examples


GENERATE: dict[str, dict[str, Any]] = {
    "a cache": {},
    "samples": {"do_sample": True, "temperature": 3.0},
    "several sequences a prompt": {"do_sample": True, "temperature": 3.0, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "a static cache": {"cache_implementation": "static"},
    "a prompt in chunks": {"prefill_chunk_size": 3},
    "a dictionary": {"return_dict_in_generate": True},
}


@pytest.mark.parametrize("how", GENERATE)
@pytest.mark.parametrize("model", ["gpt2", "llama", "mistral"], indirect=True)
def test_generate_is_recorded_as_prompt_and_continuation(model: Any, how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids, mask = left_padded()
    options = {"max_new_tokens": N_NEW, "pad_token_id": 0, "do_sample": False, **GENERATE[how]}
    with residua.Recorder(model, sites=SITES, out=tmp_path / "a") as recorder:
        recorder.annotate(columns={"label": ["a", "b", "c"]})
        output = model.generate(ids, attention_mask=mask, **options)
        model(ids[1:2])  # a call of another kind
        model.generate(ids[1:2], max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert "generate" not in vars(model)
    sequences = output if isinstance(output, Tensor) else output.sequences
    n_copies = len(sequences) // len(PROMPTS)
    archive = residua.open(tmp_path / "a")
    examples: list[dict[str, Any]] = archive.example_table.table().to_pylist()
    expected = []
    for number, sequence in enumerate(sequences.tolist()):
        prompt, new = PROMPTS[number // n_copies], sequence[ids.shape[1] :]
        expected.append([*prompt, *new[: new.index(END) + 1 if END in new else None]])
    assert [example["input_ids"] for example in examples[: len(sequences)]] == expected
    labels = [example["label"] for example in examples]
    assert labels == [label for label in "abc" for _ in range(n_copies)] + [None, None]
    plain = examples.pop(-2)
    assert plain["positions"] == list(range(6))
    n_rows = archive.example_table.index().n_rows.tolist()
    assert n_rows[:-2] == [len(tokens) - 1 for tokens in expected]
    for number, example in enumerate(examples[:-1]):
        start, stop = archive.example_table.rows(number)
        with torch.no_grad():
            full = model(torch.tensor([example["input_ids"]]), output_hidden_states=True, use_cache=True)
        np.testing.assert_allclose(
            np.asarray(archive["resid_post.1"][start:stop], np.float64),
            full.hidden_states[2][0, :-1].numpy(),
            rtol=1e-8,
            atol=1e-8,
        )
        keys = full.past_key_values.layers[1].keys[0].transpose(0, 1)
        n_keys = len(keys)  # a sliding window keeps the last ones
        if n_keys > 1:
            rows = np.asarray(archive["k.1"][start:stop], np.float64)
            np.testing.assert_allclose(rows[-(n_keys - 1) :], keys[:-1].numpy()[-len(rows) :], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
@pytest.mark.parametrize("model", ["gpt2", "llama"], indirect=True)
def test_candidates_that_are_not_taken_leave_no_rows(model: Any, how: str, tmp_path: Path) -> None:
    ids = torch.tensor([[7, 9, 7, 9, 7, 9, 7]])
    assistant: Any = TINY["opt"]().double()
    options = {"prompt_lookup_num_tokens": 3} if how == "prompt lookup" else {"assistant_model": assistant}
    plain = model.generate(ids, max_new_tokens=N_NEW, do_sample=False, pad_token_id=0)
    with residua.Recorder(model, sites=SITES, out=tmp_path / "a"):
        found = model.generate(ids, max_new_tokens=N_NEW, do_sample=False, pad_token_id=0, **options)
    assert found.tolist() == plain.tolist()
    [example] = check(model, residua.open(tmp_path / "a"), n_without_rows=1)
    assert [example["input_ids"]] == plain.tolist()


CACHES: dict[str, Callable[[Any], Any]] = {
    "its own": lambda _: None,
    "dynamic": lambda _: hf.DynamicCache(),
    "of the config": lambda model: hf.DynamicCache(config=model.config),
    "static": lambda model: hf.StaticCache(config=model.config, max_cache_len=32),
}


def steps(model: Any, cache: Any, *, masked: bool, positions: bool) -> Iterator[Tensor]:
    """Run a loop of one's own over prompts that are padded on the left, or have one length; yield the new tokens."""
    ids, mask = left_padded() if masked else left_padded([prompt[:2] for prompt in PROMPTS])
    more: dict[str, Any] = {"use_cache": True} if cache is None else {"past_key_values": cache}
    for _ in range(4):
        given = {"attention_mask": mask} if masked else {}
        if positions:
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.no_grad():
            output = model(input_ids=ids, **given, **more)
        ids = output.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        more = {"past_key_values": output.past_key_values}
        yield ids


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("masked", "positions"), [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("model", ["gpt2", "mistral"], indirect=True)
def test_a_loop_of_its_own_goes_on_with_its_examples(
    model: Any, cache: str, masked: bool, positions: bool, tmp_path: Path
) -> None:
    new = torch.zeros(0)
    with residua.Recorder(model, sites=SITES, out=tmp_path / "a") as recorder:
        for label in range(2):
            recorder.annotate(columns={"label": [label] * 3})
            new = torch.cat(list(steps(model, CACHES[cache](model), masked=masked, positions=positions)), dim=1)
    examples = check(model, residua.open(tmp_path / "a"), n_without_rows=0)
    assert [example["label"] for example in examples] == [0, 0, 0, 1, 1, 1]
    for example, prompt, tokens in zip(examples, PROMPTS, new.tolist(), strict=False):
        assert example["input_ids"] == [*(prompt if masked else prompt[:2]), *tokens[:-1]]


def test_what_a_step_cannot_say_is_refused(model: Any, tmp_path: Path) -> None:
    """Each error names what is wrong, and the examples can go on as they were."""
    ids, mask = left_padded()
    one = torch.ones_like(mask[:, :1])
    with residua.Recorder(model, sites="resid_post.*", out=tmp_path / "a") as recorder, torch.no_grad():

        def refused(message: str, **given: Any) -> None:
            with pytest.raises(CaptureError, match=message):
                model(**{"input_ids": ids[:, -1:], "attention_mask": torch.cat([mask, one], dim=1), **given})

        unknown = model(input_ids=ids, attention_mask=mask).past_key_values
        refused("past_key_values holds 6 positions.*use_cache=True", past_key_values=unknown)
        cache: Any = hf.DynamicCache()
        model(input_ids=ids, attention_mask=mask, past_key_values=cache)
        reordered, shorter = hf.DynamicCache(), hf.DynamicCache()
        for layer in range(3):
            reordered.update(cache.layers[layer].keys.flip(0), cache.layers[layer].values.flip(0), layer)
            shorter.update(cache.layers[layer].keys[:, :, :4], cache.layers[layer].values[:, :, :4], layer)
        refused("past_key_values.*reordered", past_key_values=reordered)
        refused(
            "cache holds 4 positions.*6", past_key_values=shorter, attention_mask=torch.cat([mask[:, :4], one], dim=1)
        )
        refused("2 sequences.*3", past_key_values=cache, input_ids=ids[:2, -1:], attention_mask=torch.ones(2, 7))
        refused("attention_mask", past_key_values=cache, attention_mask=torch.ones(3, 7))
        refused("attention_mask", past_key_values=cache, attention_mask=torch.ones(3, 3))
        refused("position_ids.*sequence 0", past_key_values=cache, position_ids=torch.full((3, 1), 6))
        refused("input_ids", past_key_values=cache, input_ids=None, inputs_embeds=torch.zeros(3, 1, 32).double())
        recorder.annotate(columns={"label": [1, 2, 3]})
        refused("annotate", past_key_values=cache)
        wrong: dict[str, Any]
        for wrong in ({"keep": torch.ones(3, 5)}, {"columns": {"label": [1, 2]}}):
            recorder.annotate(**wrong)
            refused("keep|label", input_ids=ids, attention_mask=mask, use_cache=True)
            with pytest.raises(CaptureError, match=r"keep|label"):
                model.generate(ids, attention_mask=mask, max_new_tokens=2)
        recorder.annotate()
        cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
        model(input_ids=ids[:, -1:], attention_mask=torch.cat([mask, one], dim=1), past_key_values=cache)
    examples = check_lengths(residua.open(tmp_path / "a"))
    assert examples == [4, 6, 2, 4, 6, 2, 5, 7, 3]


def check_lengths(archive: residua.Archive) -> list[int]:
    lengths: list[int] = archive.example_table.index().n_rows.tolist()
    return lengths


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"generation_config": hf.GenerationConfig(num_beams=3, max_new_tokens=2)}, "num_beams=3"),  # type: ignore[no-untyped-call]
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"stop_strings": ["a"]}, "stop_strings"),
        ({"inputs_embeds": torch.zeros(3, 6, 32).double()}, "inputs_embeds"),
        ({"token_type_ids": torch.zeros(3, 6, dtype=torch.int64)}, "token_type_ids"),
        ({"past_key_values": hf.DynamicCache()}, "past_key_values"),
        ({"attention_mask": torch.full((3, 6), 2)}, "attention_mask"),
    ],
)
def test_generation_that_cannot_be_recorded_is_refused_before_the_model_runs(
    model: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    ids, mask = left_padded()
    runs: list[int] = []
    with residua.Recorder(model, sites="resid_post.0", out=tmp_path / "a"):
        handle = model.register_forward_pre_hook(lambda *_: runs.append(1))
        with pytest.raises(CaptureError, match=rf"{message}[\s\S]*outside the recorder"):
            model.generate(ids, **{"attention_mask": mask, "max_new_tokens": 2, **options})
        assert not runs
        handle.remove()
        model(ids, attention_mask=mask)
    assert check_lengths(residua.open(tmp_path / "a")) == [4, 6, 2]


@pytest.mark.parametrize(("sites", "message"), [("pattern.0", "pattern.0"), ("logits", "logits")])
def test_sites_without_rows_in_a_generation_are_refused(model: Any, sites: str, message: str, tmp_path: Path) -> None:
    ids, mask = left_padded()
    with residua.Recorder(model, sites=sites, out=tmp_path / "a", max_length=16):
        with pytest.raises(CaptureError, match=message):
            model.generate(ids, attention_mask=mask, max_new_tokens=2)
        model(ids, attention_mask=mask)


def test_a_generation_that_fails_or_is_too_large_leaves_no_rows(model: Any, tmp_path: Path) -> None:
    ids, mask = left_padded()

    def stop(_ids: Tensor, _scores: Tensor) -> Tensor:
        raise ValueError("stop here")

    with residua.Recorder(model, sites="resid_post.0", out=tmp_path / "a"):
        model(ids, attention_mask=mask)
        with pytest.raises(ValueError, match="stop here"):
            model.generate(ids, attention_mask=mask, max_new_tokens=3, logits_processor=[stop])
        model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert check_lengths(residua.open(tmp_path / "a")) == [4, 6, 2, 4, 6, 2]
    recorder = residua.Recorder(model, sites="resid_post.0", out=tmp_path / "b", host_memory=2**12, rows_per_shard=2)
    with pytest.raises(CaptureError, match="host_memory"), recorder:
        model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
