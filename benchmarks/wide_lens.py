"""Lenses of one layer of a wide model with a large vocabulary, whose archive is made without the model: for `sizes.py`.

The final residual stream of a row is a mixture of a few tokens' directions, drawn by Zipf's law, of a direction that
all frequent tokens have in common, and of noise along a few hundred directions. Its logits are those of a trained model
in what matters here: some tokens have most of the probability, and tens of thousands share the rest. The layer before
has the same stream, partly mixed between channels, with other noise and channels of different sizes.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any, cast

import distributed
import numpy as np
import numpy.typing as npt
import torch
from measure import table
from safetensors.torch import save_file
from torch import Tensor, nn

from residua.analysis.lens.checkpoint import Translator
from residua.analysis.lens.lens import TunedLens
from residua.analysis.lens.lens_settings import LensSettings
from residua.analysis.lens.lm_head import LMHead, load_lm_head
from residua.analysis.lens.refine import refine
from residua.analysis.lens.ridge import Ridge
from residua.analysis.lens.rows import LensRows
from residua.analysis.lens.unembedding import Decoder
from residua.analysis.support.cluster import connect
from residua.store.examples.index import Example
from residua.store.examples.writer import ExampleWriter
from residua.store.format.create import create_archive, workspace
from residua.store.format.plan import Plan, SitePlan
from residua.store.format.sidecars import CONFIG_FILE, LM_HEAD_FILE, PARAMETERS_FILE, LMHeadSpec
from residua.store.format.writer import FilledShard, ShardWriter
from residua.store.read.archive import Archive
from residua.store.storage.files import write_file

SITE, FINAL = "resid_post.0", "final"
N_TOKENS = 64  # of an example
SHARD_ROWS = 1_024
EPOCHS = (1, 4)  # of the plain loop
_MIXED, _NOISES = 64, 512  # channels that are mixed, directions of noise
_LENGTH = 64  # of what the unembedding gets


def make_wide(path: Path, width: int, vocabulary: int, n_rows: int) -> Archive:
    """Write an archive of `n_rows` rows of one layer and of the final residual stream, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    sites = tuple(SitePlan(name=name, row_shape=(width,), dtype="bfloat16", codec="raw") for name in (SITE, FINAL))
    common = torch.randn(width, generator=generator) / width**0.5
    with workspace(path) as made:
        head = made / "head"
        head.mkdir()
        unembedding = _unembedding(width, vocabulary, common, generator)
        save_file(
            {"norm.weight": torch.full((width,), _LENGTH / width**0.5).bfloat16(), "unembed.weight": unembedding},
            head / PARAMETERS_FILE,
        )
        write_file(head / LM_HEAD_FILE, [LMHeadSpec(norm="rms", eps=1e-5, dtype="bfloat16").to_json()])
        write_file(head / CONFIG_FILE, [b'{"num_hidden_layers": 2}'])
        writer = ExampleWriter(made / "examples")
        positions = np.arange(N_TOKENS, dtype=np.int32)
        for number in range(n_rows // N_TOKENS):
            writer.add(Example(input_ids=np.full(N_TOKENS, number, np.int32), positions=positions, columns={}))
        dataset = {"digest": writer.close().digest}
        plan = Plan(model={}, dataset=dataset, rules={}, sites=sites, rows_per_shard=SHARD_ROWS, n_rows=n_rows)
        create_archive(made, path, plan, {})
    stream = _Stream(unembedding, common, generator)
    with ShardWriter(path, plan) as shards:
        for index, first in enumerate(range(0, n_rows, SHARD_ROWS)):
            here = np.arange(first, min(first + SHARD_ROWS, n_rows))
            columns: dict[str, npt.NDArray[np.generic]] = {
                "token": (here // N_TOKENS).astype(np.int32),
                "position": (here % N_TOKENS).astype(np.int32),
                "example": here // N_TOKENS,
            }
            pair = map(_bits, stream.rows(len(here)))
            values: dict[str, npt.NDArray[Any]] = dict(zip((SITE, FINAL), pair, strict=True))
            shards.submit(FilledShard(index=index, first_row=first, sites=values, columns=columns))
    return Archive(path, threads=1)


def _bits(values: Tensor) -> npt.NDArray[np.generic]:
    return values.bfloat16().view(torch.uint16).numpy()


def _unembedding(width: int, vocabulary: int, common: Tensor, generator: torch.Generator) -> Tensor:
    """Return rows of length about 1; the more frequent a token, the further its row lies along `common`."""
    found = torch.empty(vocabulary, width, dtype=torch.bfloat16)
    shares = -torch.arange(1, vocabulary + 1).float().log() / 20
    for start in range(0, vocabulary, 4_096):
        rows = torch.randn(min(4_096, vocabulary - start), width, generator=generator) / width**0.5
        found[start : start + len(rows)] = (rows + shares[start : start + len(rows), None] * common).bfloat16()
    return found


class _Stream:
    """Makes rows."""

    def __init__(self, unembedding: Tensor, common: Tensor, generator: torch.Generator) -> None:
        width = len(common)
        self._unembedding, self._common, self._generator = unembedding, common, generator
        frequencies = 1 / torch.arange(1, len(unembedding) + 1).double()
        self._frequencies = frequencies / frequencies.sum()
        self._mixing = torch.linalg.qr(torch.randn(_MIXED, _MIXED, generator=generator)).Q
        sizes = torch.arange(1, _NOISES + 1).float().rsqrt()
        self._noise = sizes[:, None] * torch.randn(_NOISES, width, generator=generator) / width**0.5
        self._channels = torch.randn(width, generator=generator).mul_(0.7).exp_()

    def rows(self, n_rows: int) -> tuple[Tensor, Tensor]:
        """Return the rows of the layer and of the final residual stream, (rows, width) each, float32."""
        generator, width = self._generator, len(self._common)
        final = 0.25 * self._normal(n_rows, _NOISES) @ self._noise + 0.35 * self._common
        for _ in range(5):
            tokens = torch.multinomial(self._frequencies, n_rows, replacement=True, generator=generator)
            shares = 0.1 + 0.15 * torch.rand(n_rows, 1, generator=generator)
            final += shares * self._unembedding[tokens].float()
        final += 0.2 * self._normal(n_rows, width) / width**0.5
        mixed = (final.view(n_rows, -1, _MIXED) @ self._mixing).view(n_rows, width)
        noise = 0.2 * self._normal(n_rows, _NOISES) @ self._noise + 0.1 * self._normal(n_rows, width) / width**0.5
        layer = (0.7 * final + 0.5 * mixed.roll(_MIXED // 2, 1) + noise) * self._channels
        return 30 * layer, 60 * final

    def _normal(self, n_rows: int, n_columns: int) -> Tensor:
        return torch.randn(n_rows, n_columns, generator=self._generator)


def steps(folder: Path, width: int, vocabulary: int, n_rows: int) -> str:
    """Measure a step of each way of refining at the true width and vocabulary."""
    archive = make_wide(folder / "steps", width, vocabulary, n_rows)
    head = load_lm_head(archive.head)
    layer, final = (archive[site].torch(slice(None)).float() for site in (SITE, FINAL))
    hand = Loop(head, layer, final, rate=1e-3)
    ways: dict[str, Callable[[], int]] = {"by hand": lambda: hand.train(2)}
    for name, candidates in (("Residua, 8,192 candidates", 8_192), ("Residua, all tokens", 0)):
        ways[name] = lambda candidates=candidates: _refined(archive, head, width, candidates)  # type: ignore[misc]
    lines, first = [], None
    for name, way in ways.items():
        started = time.process_time()
        n_done = way()
        found = 1_000 * (time.process_time() - started) / n_done
        first = first or found
        lines.append([name, f"{n_done:,}", f"{found:.1f}", f"{found / first:.2f}"])
    return table([f"width {width:,}, {vocabulary:,} tokens", "rows", "CPU ms a row", "of by hand"], lines)


def _refined(archive: Archive, head: LMHead, width: int, candidates: int) -> int:
    """Refine from the identity on the rows of the archive; return their number."""
    settings = LensSettings(candidates=candidates, held_out=0.01, skip_positions=0)
    reader = LensRows(archive, settings)
    start = torch.cat([torch.eye(width), torch.zeros(1, width)])
    ridge = Ridge(Translator.identity(width), 1e-5, torch.zeros(width), torch.eye(width), start)
    rows = len(reader.training_rows(reader.chunks()))
    refine({SITE: ridge}, FINAL, reader, Decoder(head, most_bytes=2**29), n_rows=rows, part=0, n_parts=1)
    return rows


class Loop:
    """A plain loop: autograd and Adam on the KL divergence over all tokens, rows and unembedding in float32 in memory.

    The map starts as the identity, as that of the `tuned-lens` package. The rate decays linearly.
    """

    def __init__(self, head: LMHead, layer: Tensor, final: Tensor, rate: float) -> None:
        self._weight, self._norm = (head.parameters[f"{name}.weight"].float() for name in ("unembed", "norm"))
        self._layer, self._final, self._rate = layer, final, rate
        self.map = nn.Linear(layer.shape[1], layer.shape[1])
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def decode(self, final: Tensor) -> Tensor:
        """Return the log-probabilities."""
        scaled = final * torch.rsqrt(final.square().mean(-1, keepdim=True) + 1e-5) * self._norm
        return (scaled @ self._weight.T).log_softmax(-1)

    def train(self, n_steps: int) -> int:
        """Take some steps of 128 rows; return how many rows that were."""
        generator = torch.Generator().manual_seed(0)
        adam = torch.optim.Adam(self.map.parameters(), lr=self._rate)
        decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / n_steps)
        for _ in range(n_steps):
            batch = torch.randint(len(self._layer), (128,), generator=generator)
            hidden = self._layer[batch]
            with torch.no_grad():
                target = self.decode(self._final[batch])
            loss = (target.exp() * (target - self.decode(hidden + self.map(hidden)))).sum(-1).mean()
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
            adam.step()
            decay.step()
        return 128 * n_steps


def quality(folder: Path, width: int, vocabulary: int, n_rows: int) -> str:
    """Compare KL divergence and time of whole trainings, at a smaller width and the true vocabulary."""
    archive = make_wide(folder / "quality", width, vocabulary, n_rows)
    head = load_lm_head(archive.head)
    reader = LensRows(archive, LensSettings())
    held = reader.held_out_rows(512)
    training = reader.training_rows(reader.chunks())
    layer, final = (archive[name].torch(training).float() for name in (SITE, FINAL))
    lines: list[list[str]] = []

    def measured(name: str, train: Callable[[], Callable[[Tensor], Tensor]]) -> None:
        started = time.process_time()
        mapped = train()
        seconds = time.process_time() - started
        with torch.no_grad():
            kl = _exact_kl(head, mapped(archive[SITE].torch(held).float()), archive[FINAL].torch(held))
        lines.append([name, f"{seconds:.1f}", f"{kl:.4f}"])

    def by_hand(epochs: int) -> Callable[[Tensor], Tensor]:
        loop = Loop(head, layer, final, rate=3e-3)
        loop.train(epochs * len(training) // 128)
        return lambda rows: rows + loop.map(rows)

    def ours(**settings: Any) -> Callable[[Tensor], Tensor]:
        lens = TunedLens.fit(archive, held_out_rows=512, **settings)
        return lambda rows: lens.apply(SITE, rows)

    for epochs in EPOCHS:
        measured(f"by hand, {epochs} times all rows", lambda epochs=epochs: by_hand(epochs))  # type: ignore[misc]
    measured("Residua, ridge only", lambda: ours(refine=False))
    measured("Residua, all tokens", lambda: ours(candidates=0))
    measured("Residua, 8,192 candidates", lambda: ours(candidates=8_192))
    measured("Residua, 2,048 candidates", lambda: ours(candidates=2_048))
    return table([f"width {width:,}, {vocabulary:,} tokens, {n_rows:,} rows", "CPU s", "KL"], lines)


def whole(folder: Path, width: int, vocabulary: int, n_rows: int) -> str:
    """Train one lens on a worker of the default size, from its rows to its evaluation; return its memory and time."""
    archive = make_wide(folder / "whole", width, vocabulary, n_rows)
    here, worker, ended = Process(os.getpid()), Process(0), Event()

    def watch() -> None:
        while not ended.wait(0.05):
            here.look()
            worker.look()

    watcher = Thread(target=watch)
    with connect(workers=1) as cluster:
        worker.number = next(iter(cast("Any", distributed).default_client().run(os.getpid).values()))
        watcher.start()
        started = time.process_time()
        lens = TunedLens.fit(archive, cluster=cluster, held_out_rows=4_096)
        seconds = time.process_time() - started
        ended.set()
        watcher.join()
    line = cast("Any", lens.report).to_pylist()[0]
    kls = f"{line['kl_logit_lens']:.3f} / {line['kl_ridge']:.3f} / {line['kl']:.3f} ({line['kept']})"
    figures = [worker.allocated, worker.resident, here.allocated]
    texts = [f"{cluster.memory_limit / 2**30:.0f} GiB", *(f"{one / 2**20:.1f}" for one in figures)]
    head = ["KL: logit lens / ridge / kept", "limit", "worker, GiB", "with mapped files", "here, GiB"]
    name = f"width {width:,}, {vocabulary:,} tokens, {n_rows:,} rows"
    return table(
        [name, *head, "CPU s of the worker", "and here"],
        [["", kls, *texts, f"{worker.seconds:,.0f}", f"{seconds:,.0f}"]],
    )


class Process:
    """A process, and the most memory it had when looked at, in KiB, and its processor time, in seconds."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.allocated = self.resident = 0
        self.seconds = 0.0

    def look(self) -> None:
        """Look at the process, unless it is gone."""
        try:
            text = Path(f"/proc/{self.number}/status").read_text()
            times = Path(f"/proc/{self.number}/stat").read_text().rpartition(")")[2].split()[11:13]
            allocated, mapped = (int(text.partition(f"{name}:")[2].split()[0]) for name in ("RssAnon", "RssFile"))
        except (OSError, IndexError):
            return
        self.allocated, self.resident = max(self.allocated, allocated), max(self.resident, allocated + mapped)
        self.seconds = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def _exact_kl(head: LMHead, mapped: Tensor, final: Tensor) -> float:
    """Return the mean KL divergence over all tokens, in float64."""
    decoder = Decoder(head, dtype=torch.float64, most_bytes=0)
    total = 0.0
    for start in range(0, len(final), 64):
        target, found = (decoder.logits(rows[start : start + 64].double()).log_softmax(-1) for rows in (final, mapped))
        total += float((target.exp() * (target - found)).sum())
    return total / len(final)
