"""Archives of generated text: the tokens are those of plain loops, and the archive is one like any other."""

from collections import Counter
from collections.abc import Sequence
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import residua
from residua.pipelines.generation.prompts import seed_of, units_of
from residua.store.base.errors import CaptureError, DatasetError, PlanError
from residua.store.verification.verify import verify
from tests.capture.leaking_models import LEAKING
from tests.models.tiny import LONGEST, TINY, VOCABULARY
from tests.pipelines.dataset_samples import TEMPLATE, make_tokenizer

N_NEW = 7
END = 2
PLAIN_TEMPLATE = (
    "{{ bos_token }} {% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def make_prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, VOCABULARY, length).tolist() for length in (3, 9, 1, 14, 5, 5, 2)]


def generated(model: PreTrainedModel, dataset: Any, out: Path, **options: Any) -> residua.Archive:
    settings: dict[str, Any] = {"sites": "resid_post.1", "generate": N_NEW, "batch_tokens": 64, **options}
    return residua.capture_dataset(model, dataset, out=out, **settings).archive


def examples(archive: residua.Archive) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = archive.example_table.table().to_pylist()
    return found


def tokens(archive: residua.Archive) -> list[list[int]]:
    return [example["input_ids"] for example in examples(archive)]


def greedy(model: PreTrainedModel, prompt: Sequence[int], n_new: int = N_NEW) -> list[int]:
    """Continue one prompt with transformers, alone."""
    ids, more = torch.tensor([list(prompt)]), {"do_sample": False, "pad_token_id": 0}
    run: Any = model
    found: list[int] = run.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new, **more)[0].tolist()
    return found


def sampled(
    model: PreTrainedModel, prompt: Sequence[int], seed: int, temperature: float, top_k: int, top_p: float
) -> list[int]:
    """Continue one prompt without a cache, with numpy."""
    ids, words = list(prompt), np.random.PCG64(seed)
    for _ in range(N_NEW):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double().numpy() / temperature
        order = np.argsort(-logits, kind="stable")
        probability = np.exp(logits - logits.max())
        probability[order[top_k:]] = 0.0
        probability /= probability.sum()
        before = np.cumsum(probability[order]) - probability[order]
        probability[order[before >= top_p]] = 0.0
        aim = (words.random_raw() >> 11) / 2**53 * probability.sum()
        ids.append(int(np.flatnonzero(np.cumsum(probability) > aim)[0]))
        if ids[-1] == END:
            break
    return ids


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma3", "opt"])
def test_greedy_continuations_are_those_of_one_prompt_at_a_time(name: str, tmp_path: Path) -> None:
    model = TINY[name]()
    archive = generated(model, make_prompts(), tmp_path / "a")
    assert tokens(archive) == [greedy(model, prompt) for prompt in make_prompts()]
    for prompt, example in zip(make_prompts(), examples(archive), strict=True):
        n_new = len(example["input_ids"]) - len(prompt)
        assert example["generated_from"] == len(prompt)
        assert example["generated"] == [False] * len(prompt) + [True] * n_new
        assert example["finish_reason"] == ("stop" if example["input_ids"][-1] == END else "length")
        assert "generation_seed" not in example
    with torch.no_grad():
        full = model(torch.tensor([tokens(archive)[1]]), output_hidden_states=True).hidden_states[2][0]
    start, stop = archive.example_table.rows(1)
    rows = torch.as_tensor(archive["resid_post.1"][start:stop])
    torch.testing.assert_close(rows, full, rtol=1e-4, atol=1e-4)
    assert verify(archive.path).problems == []
    if name == "gpt2":
        assert residua.reproduce(model, archive).is_exact
        with residua.replay(model, archive, examples=[1], at="resid_post.1") as run, torch.no_grad():
            logits = model(torch.tensor([tokens(archive)[1]])).logits[0]
            torch.testing.assert_close(run.logits[0], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, VOCABULARY, 1.0), (3.0, 20, 0.9), (0.5, 5, 1.0)])
def test_samples_depend_on_seed_and_prompt_alone(temperature: float, top_k: int, top_p: float, tmp_path: Path) -> None:
    model = TINY["llama"]().double()
    options: dict[str, Any] = {"temperature": temperature, "seed": 4}
    options |= {"top_k": top_k} if top_k < VOCABULARY else {}
    options |= {"top_p": top_p} if top_p < 1 else {}
    prompts = [*make_prompts(), make_prompts()[1]]
    archive = generated(model, prompts, tmp_path / "a", **options)
    seen: Counter[bytes] = Counter()
    seeds = [seed_of(4, np.array(prompt, np.int32), seen) for prompt in prompts]
    assert [example["generation_seed"] for example in examples(archive)] == seeds
    expected = [
        sampled(model, prompt, seed, temperature, top_k, top_p) for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    assert tokens(archive) == expected
    assert expected[1] != expected[-1], "a prompt that is there twice gets two continuations"
    backwards = generated(model, make_prompts()[::-1], tmp_path / "b", **{**options, "batch_tokens": 1})
    assert tokens(backwards)[::-1] == expected[:-1]
    other = generated(model, prompts, tmp_path / "c", **{**options, "seed": 5})
    assert tokens(other) != expected
    how = archive.provenance["generation"]
    assert isinstance(how, dict)
    assert (how["do_sample"], how["seed"], how["new_tokens"]) == (True, 4, N_NEW)


@pytest.mark.parametrize("name", ["averaged", "gpt2"])
def test_padding_changes_no_token(name: str, tmp_path: Path) -> None:
    """A model that shows padding to its tokens, and a setting that takes padding for tokens, run prompts alone."""
    model = LEAKING[name]() if name in LEAKING else TINY[name]()
    more: dict[str, Any] = {} if name in LEAKING else {"generation_kwargs": {"no_repeat_ngram_size": 1}}
    prompts = [[5], [7, 9, 11, 13], [3, 4]]
    found = residua.capture_dataset(
        model, prompts, out=tmp_path / "a", sites="module:lm_head", generate=4, **more, batch_tokens=512
    )
    assert any("one by one" in note for note in found.notes)
    run: Any = model
    for prompt, ids in zip(prompts, tokens(found.archive), strict=True):
        given = torch.tensor([prompt])
        settings = more.get("generation_kwargs", {})
        alone = run.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=4, do_sample=False, pad_token_id=0, **settings
        )
        assert ids == alone[0].tolist()


def test_position_rules_and_conditions_tell_prompt_from_continuation(tmp_path: Path) -> None:
    model, prompts = TINY["llama"](), make_prompts()
    everything = generated(model, prompts, tmp_path / "all")
    by_rule = {rule: generated(model, prompts, tmp_path / rule, positions=rule) for rule in ("generated", "prompt")}
    for rule, archive in by_rule.items():
        for example, prompt in zip(examples(archive), prompts, strict=True):
            n_tokens = len(example["input_ids"])
            expected = range(len(prompt), n_tokens) if rule == "generated" else range(len(prompt))
            assert example["positions"] == list(expected)
    assert by_rule["generated"].n_rows + by_rule["prompt"].n_rows == everything.n_rows
    new = np.concatenate([example["generated"] for example in examples(everything)])
    found = residua.stats(everything, "resid_post.1", where="generated == true", components=0)
    rows = np.asarray(everything["resid_post.1"][:], np.float64)[new]
    np.testing.assert_allclose(found.channels["mean"].to_numpy(), rows.mean(0), rtol=1e-4, atol=1e-5)


def test_texts_and_chats_are_prompts(tmp_path: Path) -> None:
    model = TINY["llama"]()
    tokenizer = make_tokenizer(PLAIN_TEMPLATE)
    texts = [{"prompt": "a b", "text": "no prompt", "label": 1}, {"prompt": "c", "text": "", "label": 2}]
    archive = generated(model, texts, tmp_path / "texts", tokenizer=tokenizer)
    prompts = [tokenizer("a b")["input_ids"], tokenizer("c")["input_ids"]]
    assert tokens(archive) == [greedy(model, prompt) for prompt in prompts]
    assert [(example["label"], example["text"]) for example in examples(archive)] == [(1, "no prompt"), (2, "")]
    chats: list[dict[str, Any]] = [
        {"talk": [{"role": "user", "content": "a b"}]},
        {"talk": [{"role": "user", "content": "e f g"}]},
    ]
    archive = generated(model, chats, tmp_path / "chats", tokenizer=tokenizer, prompt_column="talk")
    for example, chat in zip(examples(archive), chats, strict=True):
        encoded: Any = tokenizer.apply_chat_template(chat["talk"], add_generation_prompt=True)
        prompt = encoded["input_ids"]
        assert example["input_ids"] == greedy(model, prompt)
    ends = [{"prompt": "a </s>"}, {"prompt": "b"}]
    found = residua.capture_dataset(
        model, ends, out=tmp_path / "ends", tokenizer=tokenizer, generate=1, generation_kwargs={"eos_token_id": 1}
    )
    assert any("1 prompts end" in note for note in found.notes)
    answered = [[*chats[0]["talk"], {"role": "assistant", "content": "c"}]]
    with pytest.raises(DatasetError, match=r"row 0.*assistant.*continue_final_message"):
        generated(model, answered, tmp_path / "answered", tokenizer=tokenizer)
    with pytest.raises(DatasetError, match=r"generate.*generation prompt|add_generation_prompt"):
        generated(model, [chats[0]["talk"]], tmp_path / "none", tokenizer=make_tokenizer(TEMPLATE))


def test_prompts_have_room_for_what_is_generated(tmp_path: Path) -> None:
    model = TINY["gpt2"]()
    longest = [5] * (LONGEST - N_NEW)
    assert len(tokens(generated(model, [longest], tmp_path / "a"))[0]) <= LONGEST
    with pytest.raises(DatasetError, match=rf"row 1.*{LONGEST - N_NEW + 1} tokens.*{LONGEST - N_NEW}"):
        generated(model, [[5], [*longest, 5]], tmp_path / "b")
    with pytest.raises(DatasetError, match=r"row 0.*6 tokens.*5"):
        generated(model, [[5] * 6], tmp_path / "c", max_length=5 + N_NEW)
    with pytest.raises(DatasetError, match="no room"):
        generated(model, [[5]], tmp_path / "d", generate=LONGEST)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
    limited = generated(model, make_prompts(), tmp_path / "e", max_tokens=4)
    assert tokens(limited) == [greedy(model, prompt) for prompt in make_prompts()[:2]], "no prompt is cut"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generate": None, "temperature": 1.0}, "temperature.*generate"),
        ({"generate": None, "positions": "generated"}, r"generated.*generate.*column:NAME"),
        ({"generate": 0}, "at least 1"),
        ({"positions": "assistant"}, "assistant.*generated"),
        ({"positions": "column:marks"}, "column:marks.*generated"),
        ({"long_examples": "split", "max_length": 20}, "long_examples"),
        ({"prompt_column": "a", "text_column": "b"}, "prompt_column.*text_column"),
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams"),
        ({"generation_kwargs": {"num_return_sequences": 2}}, "num_return_sequences.*give the prompt several times"),
        ({"generation_kwargs": {"stop_strings": ["x"]}}, "stop_strings.*eos_token_id"),
        ({"generation_kwargs": {"prompt_lookup_num_tokens": 2}}, "prompt_lookup_num_tokens"),
        ({"generation_kwargs": {"temperature": 2.0}}, "temperature.*setting of its own"),
        ({"generation_kwargs": {"do_sample": False}, "top_p": 0.5}, "top_p.*do_sample"),
        *(({name: value}, f"{name}.*above 0") for name in ("temperature", "top_p") for value in (-1.0, nan, inf)),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p"),
        ({"generation_kwargs": "[1]"}, "object"),
        ({"image_column": "image"}, "image_column"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((PlanError, DatasetError), match=message):
        generated(TINY["llama"](), make_prompts(), tmp_path / "a", **options)
    assert list(tmp_path.iterdir()) == []


def test_scores_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"new token 1 .*temperature"):
        generated(TINY["llama"](), make_prompts(), tmp_path / "a", temperature=1e-320)


def test_models_that_do_not_generate_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="BertForMaskedLM"):
        generated(TINY["bert"](), make_prompts(), tmp_path / "a")
    watermarked = TINY["llama"]()
    assert watermarked.generation_config is not None
    watermarked.generation_config.guidance_scale = 2.0
    with pytest.raises(PlanError, match="guidance_scale"):
        generated(watermarked, make_prompts(), tmp_path / "a")


def test_units_depend_on_lengths_alone_and_keep_to_the_limit() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 3000).astype(np.int32)
    units = units_of(lengths, 10, 256)
    assert sorted(prompt for unit in units for prompt in unit) == list(range(3000))
    for unit in units:
        assert len(unit) == 1 or len(unit) * (int(lengths[unit].max()) + 10) <= 256
