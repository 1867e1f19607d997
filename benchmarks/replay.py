"""What starting at a layer saves: `python benchmarks/replay.py`.

A Llama of 12 blocks of width 768 (random weights, float32, one torch thread) runs the same batch of 4 examples of 128
tokens in full, and from stored rows at the input of block 9, at the input of block 6, and at the output of the last
block. The time includes reading the rows from the archive (`fast`, in the page cache). Three of twelve blocks are 0.25
of the full forward pass. The LM head runs in every case and adds to this, more with a larger vocabulary.

Then `residua.replay_dataset` replays a complete archive of 8,192 tokens, with a vector added at the input of the
middle block. The time, from the fingerprint of the weights to the tables of changes, is compared with the plain forward
pass of the same batches.
"""

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Timings, in_turns, machine, parser, publish, speedups, spread, table
from transformers import LlamaConfig, LlamaForCausalLM

import residua
from residua.capture.forward.inputs import forward_kwargs
from residua.capture.replay.engine import Replayer
from residua.store.edits.parser import parse_edits
from residua.store.read.archive import Archive

BLOCKS, WIDTH = 12, 768
EXAMPLES, POSITIONS = 4, 128
STARTS = ("resid_pre.6", "resid_pre.9", "final")
TARGET = 0.30
VOCABULARIES = (4096, 32000)
ARCHIVE_EXAMPLES, ARCHIVE_BATCH, ARCHIVE_TARGET = 64, 1024, 0.6
STEERING = {"edit": "add", "site": "resid_post.10", "vector": [1.0] * WIDTH}


def make_model(vocabulary: int) -> LlamaForCausalLM:
    """Return the model to replay."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=2048,
        num_hidden_layers=BLOCKS,
        num_attention_heads=12,
        max_position_embeddings=POSITIONS,
    )
    model = LlamaForCausalLM(config)
    model.requires_grad_(False).train(False)
    return model


def capture(model: LlamaForCausalLM, folder: Path, n_examples: int, batch_tokens: int) -> Archive:
    """Capture random tokens in batches of `batch_tokens`, one batch a shard."""
    tokens = np.random.default_rng(0).integers(3, 4096, (n_examples, POSITIONS)).tolist()
    sites = ",".join(STARTS)
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "rows_per_shard": batch_tokens}
    return residua.capture_dataset(model, tokens, out=folder / "acts.zarr", sites=sites, **options).archive


def cases(model: LlamaForCausalLM, archive: Archive) -> dict[str, Callable[[int], object]]:
    """Return the cases to time; archive and model are compared before, once."""
    examples = list(range(EXAMPLES))
    batch = Replayer(model, archive).batch(examples).padded
    kwargs = forward_kwargs(model, batch.input_ids, batch.attention_mask)

    def plain(_: int) -> None:
        with torch.no_grad():
            model(**kwargs)

    def replay(replayer: Replayer, _: int) -> None:
        replayer.run(replayer.batch(examples))

    made: dict[str, Callable[[int], object]] = {"the full model": plain}
    for start in STARTS:
        made[f"from {start}"] = partial(replay, Replayer(model, archive, at=[start]))
    edits = parse_edits([STEERING])
    made["from resid_pre.9, a vector added"] = partial(
        replay, Replayer(model, archive, at=["resid_pre.9"], edits=edits)
    )
    return made


def archive_cases(model: LlamaForCausalLM, folder: Path) -> dict[str, Callable[[int], object]]:
    """Return the cases of a replay of a complete archive."""
    archive = capture(model, folder, ARCHIVE_EXAMPLES, ARCHIVE_BATCH)
    replayer = Replayer(model, archive)
    each = ARCHIVE_BATCH // POSITIONS
    batches = [replayer.batch(list(range(i, i + each))).padded for i in range(0, ARCHIVE_EXAMPLES, each)]
    middle = f"resid_pre.{BLOCKS // 2}"
    edit = {**STEERING, "site": middle}

    def plain(_: int) -> None:
        with torch.no_grad():
            for batch in batches:
                model(**forward_kwargs(model, batch.input_ids, batch.attention_mask))

    def replay(number: int) -> None:
        residua.replay_dataset(model, archive, out=folder / f"replayed-{number}", at=middle, edits=[edit])

    return {"the plain forward pass": plain, "replay_dataset, edited at the middle": replay}


def report_archive(timings: Timings) -> str:
    """Return the table of the complete archive, and its figure."""
    plain, replayed = timings.values()
    lines = [
        [name, spread([one.cpu for one in found]), spread(speedups(found, plain, clock="cpu"))]
        for name, found in timings.items()
    ]
    ratio = spread(speedups(replayed, plain, clock="cpu"))
    head = [
        f"{ARCHIVE_EXAMPLES * POSITIONS:,} tokens, vocabulary {VOCABULARIES[0]:,}",
        "CPU seconds",
        "of the plain pass",
    ]
    return "\n".join(
        [
            "",
            table(head, lines),
            "",
            f"- A complete archive with an edit at the middle: {ratio}, target at most {ARCHIVE_TARGET}.",
        ]
    )


def report(measured: dict[int, Timings]) -> str:
    """Return the tables and the figure with a target."""
    text = [f"{BLOCKS} blocks of width {WIDTH}, {EXAMPLES * POSITIONS} tokens; " + machine("torch", "transformers")]
    for vocabulary, timings in measured.items():
        full = timings["the full model"]
        lines = [
            [name, spread([one.cpu for one in found]), spread(speedups(found, full, clock="cpu"))]
            for name, found in timings.items()
        ]
        text += ["", table([f"vocabulary {vocabulary:,}", "CPU seconds", "of the full forward pass"], lines)]
    first = measured[VOCABULARIES[0]]
    ratio = spread(speedups(first["from resid_pre.9"], first["the full model"], clock="cpu"))
    text += ["", f"- Starting at layer 9 of 12, of the full forward pass: {ratio}, target at most {TARGET}."]
    return "\n".join(text)


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__ or "", rounds=6).parse_args()
    torch.set_num_threads(1)
    measured = {}
    for vocabulary in VOCABULARIES:
        folder = Path(tempfile.mkdtemp(prefix="residua-replay-", dir=arguments.folder))
        try:
            model = make_model(vocabulary)
            archive = capture(model, folder, EXAMPLES, EXAMPLES * POSITIONS)
            measured[vocabulary] = in_turns(cases(model, archive), rounds=arguments.rounds)
        finally:
            shutil.rmtree(folder)
    folder = Path(tempfile.mkdtemp(prefix="residua-replay-", dir=arguments.folder))
    try:
        of_archive = in_turns(archive_cases(make_model(VOCABULARIES[0]), folder), rounds=max(2, arguments.rounds // 2))
    finally:
        shutil.rmtree(folder)
    publish(report(measured) + "\n" + report_archive(of_archive), arguments.out)


if __name__ == "__main__":
    main()
