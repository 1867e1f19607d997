"""The card of the shipped model, written from its figures."""

from typing import Any

CARD = """\
---
language: en
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
library_name: transformers
pipeline_tag: text-generation
---

# pydoc-1m

A language model of {n_parameters:,} parameters that learned Python's own language reference. It is small
enough to live in the repository and real enough to try things on: it predicts its text far better than
frequency does, and {n_induction} of its {n_heads} heads are induction heads.

It is a Llama: {n_layers} layers, width {width}, {n_attention_heads} heads ({n_kv_heads} for keys and values),
attention biases, tied embeddings, a byte-level vocabulary of {n_vocab} tokens, a context of
{n_positions} tokens, float32. `<|endoftext|>` is BOS and EOS. The tokenizer adds neither, and the model was
trained to do with BOS or without. It never saw an end of text, so it does not stop by itself.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("models/pydoc-1m")
tokenizer = AutoTokenizer.from_pretrained("models/pydoc-1m")
```

## Data

The `topics` of `pydoc_data`, which every Python carries for `help()`: parts of the documentation of Python
{python}, copyright Python Software Foundation, used under the PSF License Version 2. The last tenth of the
topics by name is held out ({held_out_topics});
the rest gives {n_train_tokens:,} tokens. Training paragraphs that also stand in a held-out topic were
dropped ({n_chars_dropped:,} characters).

## Loss on the held-out text

{n_tokens:,} tokens, {n_bytes:,} bytes, cut into consecutive windows. Loss is in nats a token. Guessing by the
frequency of tokens gives {unigram_loss:.3f}.

| window | loss with BOS | loss without BOS | perplexity a byte (with BOS) |
|---|---|---|---|
{loss_table}

## Induction

{n_examples} sequences of BOS and twice the same {period} random tokens. Loss is {first_loss:.2f} nats a token
in the first copy and {second_loss:.2f} in the second; {second_loss_without_best_layer:.2f} in the second when
layer {best_layer} adds nothing from its attention. The score of a head is its mean attention from a token of
the second copy to what followed that token in the first.

| layer | {head_numbers} |
|---|{rule}
{induction_table}

Mean attention to the previous token is highest, {previous_score:.2f}, in layer {previous_layer}, head
{previous_head}.

## How it was trained

1. Two blocks on repeated random tokens, one head of the first started as a previous-token head, until the
   second copies by induction ({circuit_steps} steps). A run that copies by another route is dropped, and
   tried with another seed.
2. These two become layers {circuit_layers} of {n_layers}; the others start as the identity. {text_steps}
   steps of about 2,000 tokens: three quarters text, one quarter repeats; half of the sequences without BOS;
   every fourth step at the full context.

Muon for the matrices, Adam for the rest; {cpu_seconds} CPU seconds on one thread. `report.json` has every
number. To train it again:

```
python scripts/train_model.py --out models/pydoc-1m --seed {seed}
```

The same machine and the versions named in `report.json` give the same weights; another release of Python
brings slightly different text.

## A sample

From `{prompt}`, at temperature 0.7:

```text
{sample}
```
"""


def table_row(first: object, cells: list[str]) -> str:
    """Lay out one row of a Markdown table."""
    return f"| {first} | {' | '.join(cells)} |"


def loss_table(held_out: dict[str, Any]) -> str:
    """Lay out the losses, one row a window length."""
    rows = []
    for name, losses in held_out.items():
        if name.startswith("windows_of_"):
            keys = ("loss_with_bos", "loss_without_bos", "perplexity_per_byte")
            rows.append(table_row(name.removeprefix("windows_of_"), [f"{losses[key]:.3f}" for key in keys]))
    return "\n".join(rows)


def score_table(scores: list[list[float]]) -> str:
    """Lay out one score a head, one row a layer."""
    return "\n".join(table_row(layer, [f"{score:.2f}" for score in heads]) for layer, heads in enumerate(scores))


def write_card(figures: dict[str, Any], prompt: str) -> str:
    """Write the card in Markdown.

    Args:
        figures: What the training script puts into `report.json`.
        prompt: What the sample was started from.
    """
    recipe, text, repeats = figures["recipe"], figures["text"], figures["repeats"]
    induction, previous = repeats["induction"], repeats["previous_token"]
    previous_score, previous_layer, previous_head = max(
        (score, layer, head) for layer, heads in enumerate(previous) for head, score in enumerate(heads)
    )
    values = {
        **figures,
        **figures["held_out"],
        **repeats,
        **text,
        **recipe,
        "circuit_steps": figures["circuit_steps"],
        "seed": figures["seed"],
        "python": figures["versions"]["python"],
        "held_out_topics": ", ".join(text["held_out_topics"]),
        "n_attention_heads": recipe["n_heads"],
        "n_heads": recipe["n_heads"] * recipe["n_layers"],
        "n_induction": sum(score > 0.5 for heads in induction for score in heads),
        "circuit_layers": " and ".join(map(str, recipe["circuit_layers"])),
        "loss_table": loss_table(figures["held_out"]),
        "head_numbers": " | ".join(f"head {head}" for head in range(recipe["n_heads"])),
        "rule": "---|" * recipe["n_heads"],
        "induction_table": score_table(induction),
        "previous_score": previous_score,
        "previous_layer": previous_layer,
        "previous_head": previous_head,
        "prompt": prompt,
    }
    return CARD.format(**values)
