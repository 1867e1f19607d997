"""How costs grow, against what people write by hand: `python benchmarks/sizes.py [SECTION ...]`.

Each section is a function of `SECTIONS` and returns a table; `docs/scale.md` draws the conclusions. Cases of a row are
run in turn in the same minutes, and ratios are taken within the row.

`tokens`: the standard library's source as texts of 8,000 characters in a Parquet file, and the tokenizer of the shipped
model. Alone means batches of 1,000 texts given to the tokenizer, as transformers takes them, and nothing else. Residua
reads the file, tokenizes, and writes the examples. All cores.

`probes`: 20 classes, one for each example, and 1,000 classes, one for each row, from rows in memory and in an archive
(float32, `fast`). By hand: scikit-learn's `StandardScaler` and `LogisticRegression` (L-BFGS, tol 1e-4, at most 300
iterations) on float32 rows in memory, one fit for each of seven penalties on four fifths of the training rows, a fit of
the best and one of the control on all of them, and its scores. `residua.probe` does the same from the archive, read
included, with one worker in this process. Both use one thread; seconds are processor time. The step from one worker to
two compares this with the longest way through the probes of two: what is done once, and in each pass the share of the
slower worker, or the sites of the slower worker where each makes its own passes; as processor time, without Dask's
messages.

`passes`: a sum over 10^3 and over 10^5 shards of terms that cost nothing, on two workers of a Dask cluster: tasks that
the scheduler gets, bytes of a job and of what it returns, processor seconds of this process, in which client and
scheduler run, and seconds on the clock to the first finished job and to the sum. Median of five sums after a first one.

`heads`: one layer of 32 heads of width 128 (8 of them with keys), examples of 1,024 tokens. By hand: plain torch on
float32 queries and keys in memory, one head after the other (all at once take 32 times the memory), a causal mask, a
softmax, and what is summed by index; the four scores of `residua.induction_scores`, then the six measures of
`residua.heads`. Residua reads the archive (`fast`, in the page cache). One thread. Memory is the peak of a process of
its own beyond what it had before, without file mappings, for one example of 1,024 and one of 8,192 tokens and 8 heads.

`cells`: activation patching of `resid_post.*` cell by cell, on the shipped model and on a Llama of 8 blocks of width
1,024 (random weights, float32). By hand: one hooked forward pass for each cell, the LM head on the last position only.
`residua.patch` does the same. One thread.

`lenses`: one layer with a vocabulary of 131,072 (`wide_lens.py` makes the archive). By hand: a plain loop of autograd
and Adam over all tokens, from the identity, rows and unembedding in float32 in memory. At width 4,096 what one row
costs in the refinement, on 512 rows. At width 128 whole trainings on the same 4,096 rows, reading and closed form
included; KL over all tokens, in float64, on held-out rows. One thread.

`wide`: one lens at width 8,192 with a vocabulary of 32,000 on 10,240 rows, from its rows to its evaluation, by one Dask
worker of the default size, and the most memory that the worker and the process that started it had (`RssAnon`, and with
`RssFile`).
"""

import argparse
import multiprocessing
import os
import pickle
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple, cast

import distributed
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from distributed.diagnostics.plugin import SchedulerPlugin
from measure import in_turns, machine, publish, speedups, spread, table
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from wide_lens import quality, steps, whole

import residua
from residua.analysis.probes.probe import probe
from residua.analysis.probes.site import LOGISTIC_PENALTIES
from residua.analysis.rows.blocks import Leaves
from residua.analysis.support.cluster import connect
from residua.analysis.support.sums import joined, shares, sum_share, total_of
from residua.pipelines.data.dataset import DatasetReport, read_examples
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.store.examples.index import Example
from residua.store.examples.writer import ExampleWriter
from residua.store.format.create import create_archive, workspace
from residua.store.format.plan import Plan, SitePlan
from residua.store.format.sidecars import AttentionSpec, attention_to_json
from residua.store.format.writer import FilledShard, ShardWriter
from residua.store.read.archive import Archive
from residua.store.storage.files import write_file

SITE = "resid_post.0"
N_TOKENS = 64
SHARD_ROWS = 2_048
MEMORY = "4GiB"  # of a worker, as by default
HEADS, KEY_HEADS, HEAD_WIDTH = 32, 8, 128
HEAD_TOKENS, HEAD_EXAMPLES, LONGER = 1_024, 2, 8_192
SHIPPED = Path(__file__).parent.parent / "models" / "pydoc-1m"

Rows = npt.NDArray[np.float32]


class Case(NamedTuple):
    """Probes of some sites: classes are those of examples, or of rows if there are more than a hundred."""

    n_rows: int
    width: int = 256
    n_classes: int = 20
    n_sites: int = 1
    is_by_hand: bool = True

    @property
    def name(self) -> str:
        """What the table says."""
        sites = f"{self.n_sites} sites, " if self.n_sites > 1 else ""
        return f"{sites}{self.n_rows:,} rows of width {self.width}, {self.n_classes:,} classes"

    @property
    def target(self) -> str:
        """What is predicted."""
        return "token" if self.n_classes > 100 else "label"


CASES = (
    Case(4_096),
    Case(32_768),
    Case(131_072, is_by_hand=False),
    Case(4_096, width=64, n_sites=6),
    Case(8_192, width=64, n_classes=1_000),
    Case(4_096, width=4_096),
    Case(32_768, width=4_096),
    Case(65_536, width=64, n_classes=1_000, is_by_hand=False),
    Case(8_192, width=256, n_classes=1_000),
)


def make(folder: Path, case: Case) -> tuple[Archive, Rows, npt.NDArray[np.int64]]:
    """Write the archive of a case; return it with the rows, which are those of all sites, and their classes."""
    rng = np.random.default_rng(0)
    n_rows, width = case.n_rows, case.width
    by_example = rng.integers(0, case.n_classes, n_rows // N_TOKENS)
    labels = np.repeat(by_example, N_TOKENS)
    if case.target == "token":
        labels = rng.integers(0, case.n_classes, n_rows)
    mixing = rng.standard_normal((width, width), np.float32) / width**0.5
    means = rng.standard_normal((case.n_classes, width), np.float32) * 0.15
    rows = (means[labels] + rng.standard_normal((n_rows, width), np.float32)) @ mixing
    tokens = labels.astype(np.int32) if case.target == "token" else rng.integers(0, 50_000, n_rows).astype(np.int32)
    path = folder / f"{case.n_rows}-{width}-{case.n_classes}-{case.n_sites}"
    names = [f"resid_post.{number}" for number in range(case.n_sites)]
    sites = tuple(SitePlan(name=name, row_shape=(width,), dtype="float32", codec="fast") for name in names)
    with workspace(path) as made:
        writer = ExampleWriter(made / "examples")
        for number, label in enumerate(by_example.tolist()):
            ids = tokens[number * N_TOKENS : (number + 1) * N_TOKENS]
            writer.add(
                Example(input_ids=ids, positions=np.arange(N_TOKENS, dtype=np.int32), columns={"label": str(label)})
            )
        dataset = {"digest": writer.close().digest}
        plan = Plan(model={}, dataset=dataset, rules={}, sites=sites, rows_per_shard=SHARD_ROWS, n_rows=n_rows)
        create_archive(made, path, plan, {})
    with ShardWriter(path, plan) as shards_:
        for index, first in enumerate(range(0, n_rows, SHARD_ROWS)):
            here = np.arange(first, min(first + SHARD_ROWS, n_rows))
            columns: dict[str, npt.NDArray[np.generic]] = {
                "token": tokens[here],
                "position": (here % N_TOKENS).astype(np.int32),
                "example": here // N_TOKENS,
            }
            values = cast("dict[str, Rows]", dict.fromkeys(names, rows[here]))
            shards_.submit(FilledShard(index=index, first_row=first, sites=values, columns=columns))
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
    of_examples = labels.reshape(-1, N_TOKENS)
    is_of_example = (of_examples == of_examples[:, :1]).all()
    control = rng.permutation(of_examples).reshape(-1) if is_of_example else rng.permutation(labels)
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
    """This process as a cluster of `n_workers`: it does their work one after the other, and counts each one's time.

    Attributes:
        seconds: Processor time of the workers, added up.
        waited: Of the slowest worker of each pass, added up: what the others and the fit wait for.
    """

    def __init__(self, inline: Any, n_workers: int) -> None:
        self.n_workers, self.memory_limit = n_workers, inline.memory_limit
        self.bar, self.let_go, self.send = inline.bar, inline.let_go, inline.send
        self.seconds, self.waited = 0.0, 0.0

    def _worked(self, seconds: list[float]) -> None:
        self.seconds += sum(seconds)
        self.waited += max(seconds)

    def map(self, function: Any, jobs: Any, *, heard: Any, **_: object) -> Iterator[tuple[int, Any]]:
        """Yield the result of each job, which goes to the worker that is done first."""
        here = [0.0] * self.n_workers
        for number, job in enumerate(jobs):
            seconds, found = cpu_seconds(partial(function, job, partial(heard, number)))
            here[int(np.argmin(here))] += seconds
            yield number, found
        self._worked(here)

    def sum(self, term: Any, arguments: Any, n_leaves: int, *, merge: Any, **_: object) -> Any:
        """Return the sum, from the shares that a cluster would make and in its order."""
        divided = shares(n_leaves, 2 * self.n_workers)
        here, parts = [0.0] * self.n_workers, []
        for number, share in enumerate(divided):
            seconds, part = cpu_seconds(partial(sum_share, partial(term, *arguments), share, n_leaves, merge))
            parts.append(part)
            here[number * len(here) // len(divided)] += seconds
        self._worked(here)
        return total_of(joined(parts, n_leaves, merge))


def critical_seconds(archive: Archive, target: str, n_workers: int) -> float:
    """Return the processor time of the longest way through the probes on some workers, without Dask's messages."""
    with connect("inline", memory_limit=MEMORY) as inline:
        cluster: Any = Divided(inline, n_workers)
        seconds, _ = cpu_seconds(partial(probe, archive, target, cluster=cluster))
    return float(seconds - cluster.seconds + cluster.waited)


def probes(folder: Path) -> str:
    """Compare probes."""
    lines = []
    for case in CASES:
        archive, rows, labels = make(folder, case)
        with threadpool_limits(1):
            ours, found = cpu_seconds(partial(probe, archive, case.target))
            two = critical_seconds(archive, case.target, 2)
            theirs, accuracy = cpu_seconds(partial(by_hand, rows, labels)) if case.is_by_hand else (np.nan, np.nan)
        theirs *= case.n_sites
        figures = [theirs, ours, ours / theirs, ours / two, accuracy, found["balanced_accuracy"][0].as_py()]
        texts = [f"{figure:.{digits}f}" for figure, digits in zip(figures, (1, 1, 2, 2, 3, 3), strict=True)]
        lines.append([case.name, *(text.replace("nan", "") for text in texts)])
        print(lines[-1], file=sys.stderr, flush=True)
    head = ["", "by hand, s", "Residua, s", "ratio", "1 to 2 workers", "accuracy by hand", "Residua's"]
    return table(head, lines)


def number_of(leaf: int) -> int:
    """Return the leaf: a term that costs nothing."""
    return leaf


class CountTasks(SchedulerPlugin):
    """Counts the tasks that a scheduler gets."""

    def __init__(self) -> None:
        self.n_tasks = 0

    def update_graph(self, *_: Any, tasks: Sequence[Any], **__: Any) -> None:
        """Count the tasks of a graph."""
        self.n_tasks += len(tasks)


def passes(_: Path) -> str:
    """Measure what a sum over 10^3 and over 10^5 shards costs besides its terms, on two workers."""
    lines, dask = [], cast(Any, distributed)  # its functions have no types
    with dask.LocalCluster(2, threads_per_worker=1, memory_limit=MEMORY, dashboard_address=":0") as local:
        counted = CountTasks()
        local.scheduler.add_plugin(counted)
        with connect(local.scheduler_address) as cluster:
            for n_shards in (1_000, 100_000):
                leaves = Leaves(((0, n_shards * SHARD_ROWS),), SHARD_ROWS, SHARD_ROWS)
                taken = [summed(cluster, len(leaves)) for _ in range(6)][1:]
                divided = shares(len(leaves), 4)
                returned = max(len(sum_share(number_of, share, len(leaves), int.__add__)) for share in divided)
                told = len(pickle.dumps((leaves, divided[0])))
                figures = [f"{statistics.median(one):.3f}" for one in zip(*taken, strict=True)]
                lines.append([f"{n_shards:,}", str(counted.n_tasks // 6), str(told), str(returned), *figures])
                counted.n_tasks = 0
    head = ["shards", "tasks", "bytes that a job is told", "partial sums of a job"]
    return table([*head, "CPU s of client and scheduler", "first job, s", "sum, s"], lines)


def summed(cluster: Any, n_leaves: int) -> tuple[float, float, float]:
    """Sum over shards; return processor seconds of this process, and seconds to the first job and to the sum."""
    ends: list[float] = []
    cpu, start = time.process_time(), time.perf_counter()
    found = cluster.sum(
        number_of, [], n_leaves, merge=int.__add__, label="sum", bar=lambda _: ends.append(time.perf_counter())
    )
    assert found == n_leaves * (n_leaves - 1) // 2
    return time.process_time() - cpu, ends[0] - start, time.perf_counter() - start


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


def lenses(folder: Path) -> str:
    """Compare lenses of a large vocabulary."""
    torch.set_num_threads(1)
    with threadpool_limits(1):
        return "\n\n".join([steps(folder, 4_096, 131_072, 512), quality(folder, 128, 131_072, 4_096)])


def wide(folder: Path) -> str:
    """Train a lens at width 8,192."""
    return whole(folder, 8_192, 32_000, 10_240)


def texts_of_source(n_characters: int = 8_000) -> list[str]:
    """Return the source of Python's standard library, cut into texts."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    sources = [path.read_text(errors="replace") for path in paths]
    return [one[at : at + n_characters] for one in sources for at in range(0, len(one), n_characters)]


def read_dataset(path: Path, tokenizer: Any, folder: Path) -> int:
    """Write the examples of a file of texts, as a capture does; return the tokens."""
    shutil.rmtree(folder, ignore_errors=True)
    writer, settings = ExampleWriter(folder), CaptureSettings(max_length=1_024, long_examples="split")
    options: dict[str, Any] = {"model_limit": None, "vocab_size": len(tokenizer), "report": DatasetReport()}
    for example in read_examples(str(path), settings=settings, tokenizer=tokenizer, **options):
        writer.add(example)
    return writer.close().total_tokens


def tokens(folder: Path) -> str:
    """Compare reading a dataset with the tokenizer alone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer: Any = AutoTokenizer.from_pretrained(SHIPPED)
    texts = texts_of_source()
    pq.write_table(pa.table({"text": texts}), folder / "texts.parquet")

    def alone() -> int:
        found = 0
        for at in range(0, len(texts), 1_000):
            found += sum(map(len, tokenizer(texts[at : at + 1_000], verbose=False)["input_ids"]))
        return found

    ours = partial(read_dataset, folder / "texts.parquet", tokenizer, folder / "examples")
    n_tokens = alone()
    if ours() != n_tokens:
        raise RuntimeError("the two count other tokens")
    timings = in_turns({"alone": each_round(alone), "Residua": each_round(ours)}, rounds=5)
    rates = [spread([n_tokens / one.wall / 1e6 for one in case]) for case in timings.values()]
    ratios = [spread(speedups(timings["alone"], timings["Residua"], clock=clock)) for clock in ("wall", "cpu")]
    head = ["million tokens a second", "the tokenizer alone", "Residua", "of the tokenizer alone", "by CPU"]
    return table(head, [[f"{n_tokens / 1e6:.1f} million tokens", *rates, *ratios]])


SECTIONS: dict[str, Callable[[Path], str]] = {
    "tokens": tokens,
    "probes": probes,
    "passes": passes,
    "heads": heads,
    "cells": cells,
    "lenses": lenses,
    "wide": wide,
}


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
