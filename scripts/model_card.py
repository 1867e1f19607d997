"""Write the card of the shipped model from its figures."""

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

A language model of {n_parameters:,} parameters, trained on Python's own language reference. It is small enough to
ship with the repository and real enough for experiments: it predicts its text far better than token
frequencies do, and {n_induction} of its {n_heads} heads are induction heads.

It is a Llama: {n_layers} layers, width {width}, {n_attention_heads} heads ({n_kv_heads} for keys and values),
attention biases, tied embeddings, a byte-level vocabulary of {n_vocab} tokens, a context of
{n_positions} tokens, float32. `<|endoftext|>` is BOS and EOS. The tokenizer adds neither, and the model was
trained with and without BOS. It never saw an end of text, so its output does not stop by itself.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("models/pydoc-1m")
tokenizer = AutoTokenizer.from_pretrained("models/pydoc-1m")
```

## Data

The `topics` of `pydoc_data`, which every Python has for `help()`: parts of the documentation of Python {python},
copyright Python Software Foundation, used under the PSF License Version 2. The last tenth of the topics by name
is held out ({held_out_topics});
the other topics give {n_train_tokens:,} tokens. Training paragraphs that occur in a held-out topic, too, were
removed ({n_chars_dropped:,} characters).

## Loss on the held-out text

{n_tokens:,} tokens, {n_bytes:,} bytes, cut into consecutive windows. Loss is in nats a token. A prediction from
token frequencies has {unigram_loss:.3f}.

| window | loss with BOS | loss without BOS | perplexity a byte (with BOS) |
|---|---|---|---|
{loss_table}

## Induction

{n_examples} sequences of BOS and then the same {period} random tokens twice. Loss is {first_loss:.2f} nats a token in
the first copy and {second_loss:.2f} in the second. Without the output of the attention of layer {best_layer}, it is
{second_loss_without_best_layer:.2f} in the second copy. The score of a head is its mean attention from a token of
the second copy to the token after the same token in the first copy.

| layer | {head_numbers} |
|---|{rule}
{induction_table}

Mean attention to the previous token is highest in layer {previous_layer}, head {previous_head}: {previous_score:.2f}.

## How it was trained

1. Two blocks train on repeated random tokens until the second copies by induction ({circuit_steps} steps). One
   head of the first block starts as a previous-token head. If a run copies in another way, training starts again
   with another seed.
2. These two blocks become layers {circuit_layers} of {n_layers}; the others start as the identity. {text_steps} steps
   of about 2,000 tokens follow: three quarters text, one quarter repeats; half of the sequences without BOS;
   every fourth step with the full context.

Muon trains the matrices and Adam the other parameters, in {cpu_seconds} CPU seconds on one thread. `report.json` has
every number. To train the model again:

```
python scripts/train_model.py --out models/pydoc-1m --seed {seed}
```

The same machine with the versions in `report.json` gives the same weights. Another release of Python has slightly
different text.

## A sample

From `{prompt}`, at temperature 0.7:

```text
{sample}
```
"""


def table_row(first: object, cells: list[str]) -> str:
    """Return one row of a Markdown table."""
    return f"| {first} | {' | '.join(cells)} |"


def loss_table(held_out: dict[str, Any]) -> str:
    """Return the rows of the table of losses, one for each window length."""
    rows = []
    for name, losses in held_out.items():
        if name.startswith("windows_of_"):
            keys = ("loss_with_bos", "loss_without_bos", "perplexity_per_byte")
            rows.append(table_row(name.removeprefix("windows_of_"), [f"{losses[key]:.3f}" for key in keys]))
    return "\n".join(rows)


def score_table(scores: list[list[float]]) -> str:
    """Return the rows of a table with one row for each layer and one score for each head."""
    return "\n".join(table_row(layer, [f"{score:.2f}" for score in heads]) for layer, heads in enumerate(scores))


def write_card(figures: dict[str, Any], prompt: str) -> str:
    """Return the card in Markdown.

    Args:
        figures: Content of `report.json`, as the training script writes it.
        prompt: Start of the sample.
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
