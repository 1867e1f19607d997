"""How costs grow, against what people write by hand: `python benchmarks/sizes.py [SECTION ...]`.

Each section is a function of `SECTIONS` and returns a table; `docs/scale.md` draws the conclusions. Cases of a row are
run in turn in the same minutes, and ratios are taken within the row; the last column is the growth from the smallest to
the largest size, eight times as many rows.

`probes`: 20 classes from rows of width 256 in memory and in an archive (float32, `fast`). By hand: scikit-learn's
`StandardScaler` and `LogisticRegression` (L-BFGS, tol 1e-4, at most 300 iterations) on float32 rows in memory, one fit
for each of seven penalties on four fifths of the training rows, a fit of the best and one of the control on all of
them, and its scores. `residua.probe` does the same from the archive, read included, with one worker in this process.
Both use one thread; seconds are processor time. The step from one worker to two compares the longest way through the
probe: what is done once, and in each pass the share of the slower worker, as processor time, without Dask's messages.

`passes`: a sum over 10^3 and over 10^5 shards on two workers, of terms that cost nothing: jobs, what each is told, the
partial sums that it returns, and processor seconds for adding up, in this process and without Dask's messages.

`heads`: one layer of 32 heads of width 128 (8 of them with keys), examples of 1,024 tokens. By hand: plain torch on
float32 queries and keys in memory, one head after the other (all at once take 32 times the memory), a causal mask, a
softmax, and what is summed by index; the four scores of `residua.induction_scores`, then the six measures of
`residua.heads`. Residua reads the archive (`fast`, in the page cache). One thread. Memory is the peak of a process of
its own beyond what it had before, without file mappings, for one example of 1,024 and one of 8,192 tokens and 8 heads.

`cells`: activation patching of `resid_post.*` cell by cell, on the shipped model and on a Llama of 8 blocks of width
1,024 (random weights, float32). By hand: one hooked forward pass for each cell, the LM head on the last position only.
`residua.patch` does the same. One thread.
"""

import argparse
import multiprocessing
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from measure import in_turns, machine, publish, speedups, spread, table
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import residua
from residua.analysis.probes.probe import probe
from residua.analysis.probes.site import LOGISTIC_PENALTIES
from residua.analysis.rows.blocks import Leaves
from residua.analysis.support.cluster import connect
from residua.analysis.support.sums import joined, shares, sum_share, total_of
from residua.store.examples.index import Example
from residua.store.examples.writer import ExampleWriter
from residua.store.format.create import create_archive, workspace
from residua.store.format.plan import Plan, SitePlan
from residua.store.format.sidecars import AttentionSpec, attention_to_json
from residua.store.format.writer import FilledShard, ShardWriter
from residua.store.read.archive import Archive
from residua.store.storage.files import write_file

SITE = "resid_post.0"
WIDTH, N_CLASSES, N_TOKENS = 256, 20, 64
SIZES = (4_096, 32_768)  # rows
SHARD_ROWS = 2_048
MEMORY = "1GiB"
HEADS, KEY_HEADS, HEAD_WIDTH = 32, 8, 128
HEAD_TOKENS, HEAD_EXAMPLES, LONGER = 1_024, 2, 8_192
SHIPPED = Path(__file__).parent.parent / "models" / "pydoc-1m"

Rows = npt.NDArray[np.float32]


def make(folder: Path, n_rows: int) -> tuple[Archive, Rows, npt.NDArray[np.int64]]:
    """Write an archive of `n_rows` rows; return it with its rows and their classes."""
    rng = np.random.default_rng(0)
    by_example = rng.integers(0, N_CLASSES, n_rows // N_TOKENS)
    labels = np.repeat(by_example, N_TOKENS)
    mixing = rng.standard_normal((WIDTH, WIDTH), np.float32) / WIDTH**0.5
    means = rng.standard_normal((N_CLASSES, WIDTH), np.float32) * 0.15
    rows = (means[labels] + rng.standard_normal((n_rows, WIDTH), np.float32)) @ mixing
    path = folder / str(n_rows)
    site = SitePlan(name=SITE, row_shape=(WIDTH,), dtype="float32", codec="fast")
    with workspace(path) as made:
        writer = ExampleWriter(made / "examples")
        for label in by_example.tolist():
            ids = rng.integers(0, 50_000, N_TOKENS).astype(np.int32)
            writer.add(
                Example(input_ids=ids, positions=np.arange(N_TOKENS, dtype=np.int32), columns={"label": str(label)})
            )
        dataset = {"digest": writer.close().digest}
        plan = Plan(model={}, dataset=dataset, rules={}, sites=(site,), rows_per_shard=SHARD_ROWS, n_rows=n_rows)
        create_archive(made, path, plan, {})
    with ShardWriter(path, plan) as shards_:
        for index, first in enumerate(range(0, n_rows, SHARD_ROWS)):
            here = np.arange(first, min(first + SHARD_ROWS, n_rows))
            columns: dict[str, npt.NDArray[np.generic]] = {
                "token": here.astype(np.int32),
                "position": (here % N_TOKENS).astype(np.int32),
                "example": here // N_TOKENS,
            }
            shards_.submit(FilledShard(index=index, first_row=first, sites={SITE: rows[here]}, columns=columns))
    return Archive(path, threads=1), rows, labels


def by_hand(rows: Rows, labels: npt.NDArray[np.int64]) -> float:
    """Choose the penalty, fit the labels and a control, and score; return the accuracy."""
    rng = np.random.default_rng(1)
    groups = rng.permutation(len(rows) // N_TOKENS)
    order = (groups[:, None] * N_TOKENS + np.arange(N_TOKENS)).reshape(-1)
    n_test = len(order) // 5
    n_fit = n_test + (len(order) - n_test) // 5
    test, validation, fit = np.split(order, [n_test, n_fit])
    scaler = StandardScaler().fit(rows[order[n_test:]])
    scaled = scaler.transform(rows)

    def fitted(chosen: npt.NDArray[np.int64], truth: npt.NDArray[np.int64], penalty: float) -> LogisticRegression:
        model = LogisticRegression(C=1 / (penalty * len(chosen)), max_iter=300)
        return model.fit(scaled[chosen], truth[chosen])

    tried = [fitted(fit, labels, penalty) for penalty in LOGISTIC_PENALTIES]
    best = int(np.argmax([one.score(scaled[validation], labels[validation]) for one in tried]))
    train = order[n_test:]
    control = np.repeat(rng.permutation(labels[::N_TOKENS]), N_TOKENS)
    fitted(train, control, LOGISTIC_PENALTIES[best]).score(scaled[test], control[test])
    return float(
        balanced_accuracy_score(labels[test], fitted(train, labels, LOGISTIC_PENALTIES[best]).predict(scaled[test]))
    )


def cpu_seconds(job: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor time of a job in this process, and its result."""
    start = time.process_time()
    found = job()
    return time.process_time() - start, found


class Divided:
    """This process as a cluster of `n_workers`: it makes their shares one after the other, and counts each one's time.

    Attributes:
        seconds: Processor time of the shares, by worker.
        waited: Of the slowest worker of each pass, added up: what the others and the fit wait for.
    """

    def __init__(self, inline: Any, n_workers: int) -> None:
        self.n_workers, self.memory_limit = 1, inline.memory_limit  # one site after the other
        self.bar, self.let_go, self.send = inline.bar, inline.let_go, inline.send
        self.seconds, self.waited = [0.0] * n_workers, 0.0

    def sum(self, term: Any, arguments: Any, n_leaves: int, *, merge: Any, **_: object) -> Any:
        """Return the sum, from the shares that a cluster would make and in its order."""
        divided = shares(n_leaves, 2 * len(self.seconds))
        here, parts = [0.0] * len(self.seconds), []
        for number, share in enumerate(divided):
            start = time.process_time()
            parts.append(sum_share(partial(term, *arguments), share, n_leaves, merge))
            here[number * len(here) // len(divided)] += time.process_time() - start
        self.seconds = [before + more for before, more in zip(self.seconds, here, strict=True)]
        self.waited += max(here)
        return total_of(joined(parts, n_leaves, merge))


def critical_seconds(archive: Archive, n_workers: int) -> float:
    """Return the processor time of the longest way through a probe on some workers, without Dask's messages."""
    with connect("inline", memory_limit=MEMORY) as inline:
        cluster: Any = Divided(inline, n_workers)
        seconds, _ = cpu_seconds(partial(probe, archive, "label", SITE, cluster=cluster))
    return float(seconds - sum(cluster.seconds) + cluster.waited)


def probes(folder: Path) -> str:
    """Compare probes of 20 classes."""
    lines, first = [], None
    for n_rows in SIZES:
        archive, rows, labels = make(folder, n_rows)
        with threadpool_limits(1):
            theirs, accuracy = cpu_seconds(partial(by_hand, rows, labels))
            ours, found = cpu_seconds(partial(probe, archive, "label", SITE))
            one, two = critical_seconds(archive, 1), critical_seconds(archive, 2)
        figures = (theirs, ours)
        first = first or figures
        lines.append(
            [
                f"{n_rows:,} rows",
                f"{theirs:.1f}",
                f"{ours:.1f}",
                f"{ours / theirs:.2f}",
                f"{one / two:.2f}",
                f"{accuracy:.3f} / {found['balanced_accuracy'][0].as_py():.3f}",
                f"{theirs / first[0]:.1f} / {ours / first[1]:.1f}",
            ]
        )
    head = ["", "by hand, s", "Residua, s", "ratio", "1 to 2 workers", "accuracy", "growth"]
    return table(head, lines)


def passes(_: Path) -> str:
    """Measure what a sum over 10^3 and over 10^5 shards costs besides its terms, on two workers."""
    lines = []
    for n_shards in (1_000, 100_000):
        leaves = Leaves(((0, n_shards * SHARD_ROWS),), SHARD_ROWS, SHARD_ROWS)
        divided = shares(len(leaves), 4)
        start = time.process_time()
        parts = [sum_share(lambda leaf: leaf, share, len(leaves), int.__add__) for share in divided]
        assert total_of(joined(parts, len(leaves), int.__add__)) == n_shards * (n_shards - 1) // 2
        seconds = time.process_time() - start
        n_partial = max(len(part) for part in parts)
        told = len(pickle.dumps((leaves, divided[0])))
        lines.append([f"{n_shards:,}", str(len(divided) + 1), str(told), str(n_partial), f"{seconds:.3f}"])
    return table(["shards", "jobs", "bytes that a job is told", "partial sums of a job", "s in all"], lines)


def make_heads(path: Path, n_heads: int, n_key_heads: int, n_tokens: int, n_examples: int) -> Archive:
    """Write an archive of random queries and keys of one layer, on a block of tokens that is repeated once."""
    rng = np.random.default_rng(0)
    n_rows, block = n_examples * n_tokens, rng.integers(0, 50_000, n_tokens // 2).astype(np.int32)
    ids, positions = np.tile(block, 2), np.arange(n_tokens, dtype=np.int32)
    widths = {"q.0": (n_heads, HEAD_WIDTH), "k.0": (n_key_heads, HEAD_WIDTH)}
    sites = tuple(SitePlan(name=n, row_shape=shape, dtype="float32", codec="fast") for n, shape in widths.items())
    spec = AttentionSpec(scale=HEAD_WIDTH**-0.5, causal=True)
    with workspace(path) as made:
        writer = ExampleWriter(made / "examples")
        for _ in range(n_examples):
            writer.add(Example(input_ids=ids, positions=positions, columns={"period": n_tokens // 2}))
        dataset = {"digest": writer.close().digest}
        write_file(made / "head" / "attention.json", [attention_to_json({0: spec})])
        plan = Plan(model={}, dataset=dataset, rules={}, sites=sites, rows_per_shard=n_tokens, n_rows=n_rows)
        create_archive(made, path, plan, {})
    with ShardWriter(path, plan) as shards_:
        for number in range(n_examples):
            columns: dict[str, npt.NDArray[np.generic]] = {
                "token": ids,
                "position": positions,
                "example": np.full(n_tokens, number),
            }
            values = {name: rng.standard_normal((n_tokens, *shape), np.float32) for name, shape in widths.items()}
            shards_.submit(FilledShard(index=number, first_row=number * n_tokens, sites=values, columns=columns))
    return Archive(path, threads=1)


def pairs_by_hand(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return which pairs are hidden, of equal tokens, and of a token with what followed an earlier equal one."""
    same = (ids[:, None] == ids).tril_(-1)
    followed = torch.zeros_like(same)
    followed[:, 1:] = same[:, :-1]
    return torch.ones_like(same).triu_(1), same, followed


def scores_by_hand(pattern: Tensor, same: Tensor, followed: Tensor) -> list[float]:
    """Return the four scores of one head, not divided by their queries."""
    stripe = pattern.diagonal(1 - len(pattern) // 2)[1:]
    return [float(one.double().sum()) for one in (stripe, pattern.diagonal(-1), pattern[same], pattern[followed])]


def measures_by_hand(pattern: Tensor, followed: Tensor, distance: Tensor) -> list[float]:
    """Return the six measures of one head, not divided by their queries."""
    sums = [pattern.diagonal(), pattern.diagonal(-1), torch.special.entr(pattern)]
    sums += [pattern * distance, pattern * distance**2, pattern[followed]]
    return [float(one.double().sum()) for one in sums]


def heads_by_hand(rows: list[tuple[Tensor, Tensor]], ids: Tensor, *, measures: bool) -> float:
    """Score or measure all heads of some examples, given as queries and keys, one head after the other."""
    hidden, same, followed = pairs_by_hand(ids)
    distance = (torch.arange(len(ids))[:, None] - torch.arange(len(ids))).abs().float() if measures else torch.empty(0)
    total = 0.0
    for query, key in rows:
        for head in range(query.shape[1]):
            keys = key[:, head * key.shape[1] // query.shape[1]]
            score = (query[:, head] @ keys.T).mul_(HEAD_WIDTH**-0.5)
            pattern = score.masked_fill_(hidden, -torch.inf).softmax(-1)
            if measures:
                total += sum(measures_by_hand(pattern, followed, distance))
            else:
                total += sum(scores_by_hand(pattern, same, followed))
    return total


def rows_and_tokens(archive: Archive) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Return queries and keys of each example, in memory, and the tokens, which all examples share."""
    found = [archive.example(number) for number in range(len(archive.example_table))]
    rows = [(torch.from_numpy(one["q.0"]), torch.from_numpy(one["k.0"])) for one in found]
    return rows, torch.from_numpy(archive.example_table.tokens(0).astype(np.int64))


def run_heads(case: str, path: Path) -> None:
    """Run one case of `heads` in this process."""
    torch.set_num_threads(1)
    archive = Archive(path, threads=1)
    if case == "by hand":
        heads_by_hand(*rows_and_tokens(archive), measures=True)
    else:
        residua.heads(archive)


def peak_mib(case: str, path: Path, warm: Path) -> float:
    """Return how many MiB a case allocates at most, in this process, after a smaller run of it."""
    run_heads(case, warm)
    before, peak, done = anonymous_kib(), [0], Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak.append(max(peak.pop(), anonymous_kib()))

    watcher = Thread(target=watch)
    watcher.start()
    run_heads(case, path)
    done.set()
    watcher.join()
    return (peak[0] - before) / 1024


def anonymous_kib() -> int:
    """Return this process's resident memory without file mappings, in KiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0])


def heads(folder: Path) -> str:
    """Compare scores and measures of heads, and their memory at two lengths."""
    torch.set_num_threads(1)
    archive = make_heads(folder / "a", HEADS, KEY_HEADS, HEAD_TOKENS, HEAD_EXAMPLES)
    rows, ids = rows_and_tokens(archive)
    kinds: dict[str, tuple[Callable[[int], object], Callable[[int], object]]] = {
        "four scores of induction": (
            lambda _: heads_by_hand(rows, ids, measures=False),
            lambda _: residua.induction_scores(archive),
        ),
        "six measures": (
            lambda _: heads_by_hand(rows, ids, measures=True),
            lambda _: residua.heads(archive),
        ),
    }
    lines = []
    with threadpool_limits(1):
        for kind, cases in kinds.items():
            cases[1](0)  # opens and checks the archive
            timings = in_turns(dict(zip(("by hand", "Residua"), cases, strict=True)), rounds=5)
            rates = [[HEADS * HEAD_EXAMPLES / one.cpu for one in found] for found in timings.values()]
            faster = [
                spread(speedups(timings["by hand"], timings["Residua"], clock=clock)) for clock in ("cpu", "wall")
            ]
            lines.append([kind, *(spread(rate, 0) for rate in rates), *faster])
    head = ["heads and examples a CPU second", "by hand", "Residua", "times as fast, CPU", "on the clock"]
    return "\n\n".join([table(head, lines), memory_of_heads(folder)])


def memory_of_heads(folder: Path) -> str:
    """Return the table of the memory that heads of examples of two lengths take."""
    places = {n: folder / f"long-{n}" for n in (64, HEAD_TOKENS, LONGER)}
    for n_tokens, place in places.items():
        make_heads(place, 2, 2, n_tokens, 1)
    lines = []
    for case in ("by hand", "Residua"):
        found = []
        for n_tokens in (HEAD_TOKENS, LONGER):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                found.append(pool.submit(peak_mib, case, places[n_tokens], places[64]).result())
        lines.append([case, *(f"{one:,.0f}" for one in found), f"{found[1] / found[0]:.1f}"])
    return table(["six measures, MiB", *(f"{n:,} tokens" for n in (HEAD_TOKENS, LONGER)), "growth"], lines)


def patched_by_hand(model: Any, pair: dict[str, Any], positions: list[int]) -> list[float]:
    """Return the logit difference with each cell patched: one hooked forward pass each."""
    blocks, kept, found = model.model.layers, dict[int, Tensor](), []

    def logits(example: str) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(torch.tensor([pair[example]]), logits_to_keep=1, use_cache=False).logits[0, -1]
        return out

    def put_in(layer: int, position: int, output: Tensor) -> Tensor:
        output[:, position] = kept[layer][:, position]
        return output

    handles = [
        block.register_forward_hook(lambda _m, _i, out, n=number: kept.update({n: out.clone()}))
        for number, block in enumerate(blocks)
    ]
    logits("clean")
    for handle in handles:
        handle.remove()
    for layer, block in enumerate(blocks):
        for position in positions:
            handle = block.register_forward_hook(lambda _m, _i, out, at=(layer, position): put_in(at[0], at[1], out))
            patched = logits("corrupted")
            handle.remove()
            found.append(float(patched[pair["answer"]] - patched[pair["wrong"]]))
    return found


def each_round(job: Callable[[], object]) -> Callable[[int], object]:
    """Return a case of `in_turns` that does the same in each round."""
    return lambda _: job()


def wide_model() -> LlamaForCausalLM:
    """Return a model of width 1,024."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 1_024, "intermediate_size": 2_816, "num_attention_heads": 16}
    config = LlamaConfig(vocab_size=4_096, num_hidden_layers=8, max_position_embeddings=128, **sizes)
    return LlamaForCausalLM(config)


def cells(_: Path) -> str:
    """Compare patch sweeps."""
    torch.set_num_threads(1)
    models: dict[str, tuple[Any, int]] = {
        "shipped model, width 128, 6 blocks": (AutoModelForCausalLM.from_pretrained(SHIPPED), 1),
        "width 1,024, 8 blocks": (wide_model(), 4),
    }
    lines = []
    for name, (model, step) in models.items():
        model.requires_grad_(False).train(False)
        ids = np.random.default_rng(0).integers(3, 1_000, 32).tolist()
        pair = {"clean": ids, "corrupted": [*ids[:8], ids[8] + 1, *ids[9:]], "answer": 7, "wrong": 9}
        positions = list(range(step - 1, 32, step))
        hand = partial(patched_by_hand, model, pair, positions)
        ours = partial(residua.patch, model, [pair], sites="resid_post.*", positions=positions)
        found = ours()
        apart = np.abs(found["value"].to_numpy() - hand()).max()
        timings = in_turns({"by hand": each_round(hand), "Residua": each_round(ours)}, rounds=3)
        rates = [[found.num_rows / one.cpu for one in case] for case in timings.values()]
        faster = [spread(speedups(timings["by hand"], timings["Residua"], clock=clock)) for clock in ("cpu", "wall")]
        lines.append([f"{name}, {found.num_rows} cells", *(spread(rate, 0) for rate in rates), *faster, f"{apart:.0e}"])
    head = ["cells a CPU second", "by hand", "Residua", "times as fast, CPU", "on the clock", "greatest difference"]
    return table(head, lines)


SECTIONS: dict[str, Callable[[Path], str]] = {"probes": probes, "passes": passes, "heads": heads, "cells": cells}


def main() -> None:
    """Measure and report."""
    made = argparse.ArgumentParser(description=__doc__ or "")
    made.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    made.add_argument("--out", type=Path, help="also write the tables to this file")
    made.add_argument("--folder", type=Path, default=None, help="where to write; by default a temporary folder")
    options = made.parse_args()
    parts = [machine("numpy", "scikit-learn", "scipy", "dask", "distributed", "torch", "transformers")]
    if unknown := set(options.sections) - set(SECTIONS):
        made.error(f"there is no section {min(unknown)}: choose from {', '.join(SECTIONS)}")
    for name in options.sections or SECTIONS:
        folder = Path(tempfile.mkdtemp(prefix="residua-sizes-", dir=options.folder))
        try:
            parts.append(f"### {name}\n\n{SECTIONS[name](folder)}")
        finally:
            shutil.rmtree(folder)
    publish("\n\n".join(parts), options.out)


if __name__ == "__main__":
    main()
