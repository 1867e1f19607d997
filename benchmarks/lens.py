"""Training tuned lenses, compared with the loop of the `tuned-lens` package: `python benchmarks/lens.py`.

The shipped model runs over Python's own documentation, cut into examples of 128 tokens. Nine in ten examples may
train, the others evaluate. The package's trainer does not run with transformers 5, so its loop is rewritten here with
its published settings: 250 steps, each with a forward pass of the model; KL divergence; SGD with Nesterov momentum 0.9
and rate 1, weight decay 1e-3, linear decay, gradients clipped to length 1. A step takes 1,536 tokens in place of
262,144, for which a CPU would need an hour, and computes in float32, which on a CPU is faster than bfloat16. Two more
optimizers run in the same loop: Adam as the package sets it up, at the best rate of 1e-3, 5e-3, 1e-2, 2e-2 and 3e-2;
and Muon as its later versions do (torch's own, with AdamW for the biases), at their rate of 0.01, and at 5 times that
rate, the best of 1, 2, 5 and 10 times.

For each comparison Residua captures as many examples as it needs, drawn at random, in bfloat16. It trains with its
defaults, on first positions too. Two columns show its time: with the capture, which includes the model's forward
passes, and without it, from the archive to the choice of the best map of each layer. Time is processor time on one
thread; loading the model is not counted. KL is in nats a token, the mean over the inputs of all six blocks, on the
same held-out rows for all.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from measure import machine, parser, publish, table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from residua.analysis.lens.lens import TunedLens
from residua.analysis.lens.lens_settings import LensSettings
from residua.analysis.lens.train import LensTraining
from residua.analysis.support.cluster import connect
from residua.pipelines.capture.capture import capture_dataset
from residua.store.read.archive import Archive

MODEL = Path(__file__).parent.parent / "models" / "pydoc-1m"
LENGTH, STEPS, BATCH = 128, 250, 12
ALL = 10**9
Logits = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Outcome:
    """One training.

    Attributes:
        kl: Held-out KL divergence in nats, mean over layers.
        seconds: All CPU seconds.
        without_capture: CPU seconds without the capture; for the package's loop, which needs the model, all of them.
    """

    kl: float
    seconds: float
    without_capture: float


class Text:
    """The examples, and the model's own states on those that evaluate."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.model: Any = AutoModelForCausalLM.from_pretrained(MODEL)
        self.model.eval()  # type: ignore[no-untyped-call]  # transformers leaves it bare
        self.model.requires_grad_(False)
        tokens = self.tokenizer("\n\n".join(topics.values()), verbose=False)["input_ids"]
        examples = torch.tensor(tokens[: len(tokens) // LENGTH * LENGTH]).view(-1, LENGTH)
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
        self.training = examples[order[len(order) // 10 :]]
        self.states, self.labels = self.run(examples[order[: len(order) // 10]])

    def run(self, examples: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the input of each block, (examples, positions, width), and the model's log-probabilities."""
        with torch.no_grad():
            output = self.model(examples, output_hidden_states=True)
        return list(output.hidden_states[:-1]), output.logits.log_softmax(-1)

    def decode(self, hidden: Tensor) -> Tensor:
        """Apply the model's final norm and unembedding."""
        logits: Tensor = self.model.lm_head(self.model.model.norm(hidden))
        return logits

    def kl(self, logits: Logits) -> list[float]:
        """Return the held-out KL divergence of each layer."""
        with torch.no_grad():
            return [
                (self.labels.exp() * (self.labels - logits(layer, hidden).log_softmax(-1))).sum(-1).mean().item()
                for layer, hidden in enumerate(self.states)
            ]


def optimizers(kind: str, parameters: list[nn.Parameter], scale: float) -> list[torch.optim.Optimizer]:
    """Set up an optimizer as the package does."""
    if kind == "sgd":
        return [torch.optim.SGD(parameters, lr=0.1 * scale, momentum=0.9, nesterov=True, weight_decay=1e-3)]
    if kind == "adam":
        return [torch.optim.Adam(parameters, lr=1e-3 * scale, amsgrad=True, betas=(0.9, 0.999), weight_decay=1e-3)]
    matrices = [parameter for parameter in parameters if parameter.ndim == 2]
    biases = [parameter for parameter in parameters if parameter.ndim != 2]
    adam = torch.optim.AdamW(biases, lr=0.01 * scale, weight_decay=0.01, betas=(0.9, 0.999))
    muon = torch.optim.Muon(
        matrices, lr=0.01 * scale, weight_decay=0.01, momentum=0.9, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, adam]


def batches(examples: Tensor) -> Iterator[Tensor]:
    """Yield batches of examples without end, in a new order for each epoch."""
    generator = torch.Generator().manual_seed(1)
    while True:
        order = torch.randperm(len(examples), generator=generator)
        yield from examples[order[: len(order) // BATCH * BATCH]].view(-1, BATCH, LENGTH)


def their_loop(text: Text, kind: str, scale: float) -> Outcome:
    """Train as the package does."""
    started = time.process_time()
    width = text.states[0].shape[-1]
    translators = nn.ModuleList(nn.Linear(width, width) for _ in text.states)
    for parameter in translators.parameters():
        nn.init.zeros_(parameter)
    chosen = optimizers(kind, list(translators.parameters()), scale)
    decays = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1 - step / STEPS) for one in chosen]
    for _, batch in zip(range(STEPS), batches(text.training), strict=False):
        states, labels = text.run(batch)
        for translator, hidden in zip(translators, states, strict=True):
            log = text.decode(hidden + translator(hidden)).log_softmax(-1)
            (labels.exp() * (labels - log)).sum(-1).mean().backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
        nn.utils.clip_grad_norm_(translators.parameters(), 1.0)
        for one, decay in zip(chosen, decays, strict=True):
            one.step()
            one.zero_grad(set_to_none=False)
            decay.step()
    seconds = time.process_time() - started
    kl = text.kl(lambda layer, hidden: text.decode(hidden + translators[layer](hidden)))
    return Outcome(float(np.mean(kl)), seconds, seconds)


def captured(text: Text, n_tokens: int, folder: Path) -> tuple[Archive, float]:
    """Capture the first examples of a random order.

    Returns:
        The archive and the CPU seconds of the capture; NaN if the archive was there already.
    """
    path = folder / f"{n_tokens}.zarr"
    if path.is_dir():
        return Archive(path), float("nan")
    started = time.process_time()
    examples = text.training[: max(1, n_tokens // LENGTH)].tolist()
    capture_dataset(
        text.model, examples, out=path, tokenizer=text.tokenizer, sites="resid_pre.*,final", dtype="bfloat16"
    )
    return Archive(path), time.process_time() - started


def ours(text: Text, n_tokens: int, folder: Path, **settings: Any) -> Outcome:
    """Capture some tokens and train on them."""
    archive, capture = captured(text, n_tokens, folder)
    started = time.process_time()
    chosen = LensSettings(skip_positions=0, held_out=0.05, held_out_rows=1024, **settings)
    with connect("inline") as cluster, TemporaryDirectory() as out:
        training = LensTraining(archive, Path(out), settings=chosen, cluster=cluster)
        training.train()
        lens = TunedLens(*training.evaluate())
    seconds = time.process_time() - started
    kl = text.kl(lambda layer, hidden: lens.decode(f"resid_pre.{layer}", hidden))
    return Outcome(float(np.mean(kl)), capture + seconds, seconds)


def options_table(exact: Outcome, cheaper: dict[str, Outcome]) -> str:
    """Return the table of what each option saves and costs."""
    lines = [
        [name, f"{one.kl:.3f}", f"{100 * (one.kl / exact.kl - 1):+.1f} %", f"{one.without_capture:.1f}"]
        for name, one in {"all rows, once": exact, **cheaper}.items()
    ]
    return table(["training on the same archive", "KL", "against the first", "CPU seconds"], lines)


def report(theirs: dict[str, Outcome], residua: dict[str, Outcome], plain: float) -> str:
    """Return the table, and how the figures compare with their targets."""
    lines = [["logit lens", f"{plain:.3f}", "-", "-"]]
    for name, one in {**theirs, **residua}.items():
        lines.append([name, f"{one.kl:.3f}", f"{one.seconds:.1f}", f"{one.without_capture:.1f}"])
    head = ["lens", "KL", "CPU seconds", "without capture"]
    lines_of_report = [machine("torch", "transformers", "numpy"), "", table(head, lines), ""]
    for name, other, shares in (("SGD, its default", SHORT, (20, 40)), ("Adam, best rate", MIDDLE, (5, 10))):
        base, mine = theirs[name], residua[other]
        lines_of_report.append(
            f"- {name}, in a fraction of its time: KL {mine.kl:.3f} against {base.kl:.3f} in 1/"
            f"{base.seconds / mine.seconds:.1f} of its time with the capture (target 1/{shares[0]}), 1/"
            f"{base.seconds / mine.without_capture:.1f} without (target 1/{shares[1]})."
        )
    mine = residua[LONG]
    for name, target in (("Muon, its rate", ", target 3 %"), ("Muon, best rate", "")):
        base = theirs[name]
        lines_of_report.append(
            f"- {name}: KL {100 * (1 - mine.kl / base.kl):.1f} % lower{target}, in {mine.seconds / base.seconds:.2f} "
            "of its time with the capture."
        )
    return "\n".join(lines_of_report)


SHORT, MIDDLE, LONG = "Residua, 11k tokens", "Residua, 45k tokens", "Residua, all, 3 epochs"
THEIRS = {
    "SGD, its default": ("sgd", 1.0),
    "Adam, best rate": ("adam", 20.0),
    "Muon, its rate": ("muon", 1.0),
    "Muon, best rate": ("muon", 5.0),
}
CHEAPER: dict[str, dict[str, Any]] = {
    "three times": {"epochs": 3},
    "48,000 rows": {"rows": 48_000},
    "12,000 rows": {"rows": 12_000},
    "256 of the 1,024 tokens as candidates": {"candidates": 128},
    "128 of the 1,024 tokens as candidates": {"candidates": 64},
    "rows divided in 2, lenses averaged": {"parts": 2},
    "rows divided in 4, lenses averaged": {"parts": 4},
    "ridge only": {"refine": False},
}
OURS: dict[str, tuple[int, dict[str, Any]]] = {
    SHORT: (11_000, {}),
    MIDDLE: (45_000, {}),
    LONG: (ALL, {"epochs": 3}),
}


def main() -> None:
    """Run everything once."""
    options = parser(__doc__ or "", rounds=1).parse_args()
    torch.set_num_threads(1)
    text = Text()
    with TemporaryDirectory(dir=options.folder) as folder:
        ours(text, 1280, Path(folder))  # warms up imports and caches, which no case should pay for
        residua = {name: ours(text, n, Path(folder), **settings) for name, (n, settings) in OURS.items()}
        exact = ours(text, ALL, Path(folder))
        cheaper = {name: ours(text, ALL, Path(folder), **settings) for name, settings in CHEAPER.items()}
    theirs = {name: their_loop(text, *case) for name, case in THEIRS.items()}
    plain = float(np.mean(text.kl(lambda _, hidden: text.decode(hidden))))
    publish(f"{report(theirs, residua, plain)}\n\n{options_table(exact, cheaper)}", options.out)


if __name__ == "__main__":
    main()
