"""What is checked of an encoder-decoder over tokens: rows of both stacks, over ragged pairs of source and target.

Each pair also runs alone and without padding; its hidden states and attention weights of both stacks decide. What a
decoder reads of the source is held against the eager weights of its cross-attention, and against its own product.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import residua
from tests.models.checks.calls import check_modules
from tests.models.checks.language import Checks, Rows, is_softmax_of, note_reasons
from tests.models.checks.truth import LOGITS, ROWS, ModuleLog, difference, eager, examples_of, states_of
from tests.models.findings import Record, StackRecord

_SOURCES, _TARGETS = (5, 9, 17, 30), (3, 14, 8, 21)
_STACKS = ("encoder", "decoder")


class PairTruth:
    """What transformers gives for each pair alone.

    Attributes:
        pairs: Arguments of a call for each pair.
        outputs: What the model gave for each, with hidden states.
        eager: The same under eager attention, with attention weights; empty if it cannot be had.
        log: What the modules gave for the last pair.
    """

    def __init__(self, model: PreTrainedModel, sources: Sequence[list[int]], targets: Sequence[list[int]]) -> None:
        self.model = model
        self.pairs: list[dict[str, Any]] = [
            {
                "input_ids": torch.tensor([source]),
                "attention_mask": torch.ones(1, len(source), dtype=torch.int64),
                "decoder_input_ids": torch.tensor([target]),
                "use_cache": False,
            }
            for source, target in zip(sources, targets, strict=True)
        ]
        self.outputs = [self.run(pair, output_hidden_states=True) for pair in self.pairs]
        self.log = ModuleLog(model)
        with self.log.watching():
            self.run(self.pairs[-1])
        self.eager: list[Any] = []
        with eager(model):
            try:
                found = [self.run(pair, output_attentions=True) for pair in self.pairs]
                same = all(difference(f.logits, o.logits) <= LOGITS for f, o in zip(found, self.outputs, strict=True))
                self.eager = found if same else []
            except Exception:  # noqa: BLE001 - a model without eager attention has no weights to compare with
                self.eager = []

    def run(self, pair: dict[str, Any], **options: Any) -> Any:
        """Run one pair alone."""
        with torch.no_grad():
            return self.model(**pair, **options)


class PairStackTruth:
    """What `PairTruth` has of one stack, as `tests.models.checks.truth.Truth` has it of a model with one."""

    def __init__(self, truth: PairTruth, stack: str) -> None:
        side = "input_ids" if stack == "encoder" else "decoder_input_ids"
        self.ids = [pair[side][0].tolist() for pair in truth.pairs]
        self.logits = [output.logits[0] for output in truth.outputs]
        self.hidden = [states_of(output, f"{stack}_hidden_states") for output in truth.outputs]
        self.weights = [states_of(output, f"{stack}_attentions") for output in truth.eager] or [None] * len(self.ids)
        self.log = truth.log
        self._truth = truth

    def again(self) -> Tensor:
        """Run the last pair once more, and return its logits."""
        logits: Tensor = self._truth.run(self._truth.pairs[-1]).logits
        return logits


class StackRows(Rows):
    """Rows of one stack, whose sites are named without it."""

    def __init__(self, archive: Any, stack: str) -> None:
        super().__init__([archive])
        self.prefix = f"{stack}."
        self.archives = [self]
        self.sites = tuple(name.removeprefix(self.prefix) for name in archive.sites if name.startswith(self.prefix))
        self._archive = archive

    def example(self, number: int, site: str) -> dict[str, Any]:
        """As an archive's own."""
        return {site: self._archive.example(number, f"{self.prefix}{site}")[f"{self.prefix}{site}"]}


def check_pairs(model: PreTrainedModel, record: Record) -> None:
    """Check all that an encoder-decoder offers; what it lacks is noted with the reason that Residua gives."""
    highest = min(int(model.config.get_text_config().vocab_size), 97)
    truth = PairTruth(model, examples_of(highest, _SOURCES, lowest=8), examples_of(highest, _TARGETS, lowest=8))
    record.runs = True
    sites = record.attempt("sites", residua.model_sites, model) or {}
    record.offer(sites)
    record.n_blocks = max((len(record.offered.get(f"{stack}.resid_post", [])) for stack in _STACKS), default=0)
    with tempfile.TemporaryDirectory() as folder:
        result = None
        if sites:
            rows = [
                {"input_ids": pair["input_ids"][0].tolist(), "decoder_input_ids": pair["decoder_input_ids"][0].tolist()}
                for pair in truth.pairs
            ]
            out = Path(folder) / "rows"
            result = record.attempt(
                "capture", residua.capture_dataset, model, rows, sites=",".join(sites), out=out, batch_tokens=64
            )
        if result is not None:
            record.notes = list(result.notes)
            archives = dict(result.archive.stacks)
            for stack, archive in archives.items():
                record.attempt(f"sites of {stack}", _check_stack, model, record, stack, sites, truth, archive)
            if len(archives) == len(_STACKS):
                record.attempt("cross-attention", _check_cross, record, sites, truth, archives)
    record.attempt("modules", check_modules, model, record, truth.pairs[-1], truth.log)
    record.attempt("reasons", note_reasons, model, record, sites, _STACKS if sites else ("",))


def _check_stack(
    model: PreTrainedModel, record: Record, stack: str, sites: dict[str, Any], truth: PairTruth, archive: Any
) -> None:
    own = {name.removeprefix(f"{stack}."): info for name, info in sites.items() if info.site.stack == stack}
    n_blocks = len([name for name in own if name.startswith("resid_post.")])
    noted = StackRecord(record, stack, n_blocks)
    of_stack = PairStackTruth(truth, stack)
    check = Checks(model, noted, own, of_stack, StackRows(archive, stack), prefix=f"{stack}.")
    check.all()


def _check_cross(record: Record, sites: dict[str, Any], truth: PairTruth, archives: dict[str, Any]) -> None:
    """What a decoder reads of the source: eager weights, ``z = pattern @ v`` and the softmax of ``q @ k``."""
    noted = StackRecord(record, "decoder", record.n_blocks)
    layers = [int(name.rpartition(".")[2]) for name in sites if name.startswith("decoder.cross_pattern.")]
    for layer in layers:
        if all(f"decoder.cross_{kind}.{layer}" in sites for kind in ("q", "k", "v", "z")):
            for number in range(len(truth.pairs)):
                cross = _Cross(truth, archives, number, layer)
                cross.check(noted, len(layers))
                if number == len(truth.pairs) - 1:
                    cross.check_product(noted)


class _Cross:
    """A decoder's attention to the source of one pair in one block, as it was captured."""

    def __init__(self, truth: PairTruth, archives: dict[str, Any], number: int, layer: int) -> None:
        def rows(kind: str) -> Tensor:
            name = f"decoder.cross_{kind}.{layer}"
            found = archives[_stack_with(archives, name)].example(number, name)[name][:]
            return torch.as_tensor(found.astype("float32"))

        self._truth, self._number, self._layer = truth, number, layer
        self._q, self._z = rows("q"), rows("z")
        self._pattern = rows("pattern").permute(1, 0, 2)[..., : truth.pairs[number]["input_ids"].shape[1]]
        n_times = self._q.shape[1] // rows("k").shape[1]
        self._k, self._v = (rows(kind).repeat_interleave(n_times, dim=1) for kind in ("k", "v"))

    def check(self, noted: StackRecord, n_layers: int) -> None:
        """Compare the pattern with eager weights, and the heads' outputs with the values weighted by it."""
        eager_of = self._truth.eager
        weights = states_of(eager_of[self._number], "cross_attentions") if eager_of else None
        if weights is not None and len(weights) == n_layers:
            error = difference(self._pattern, weights[self._layer][0].float())
            text = f"differs from the eager weights by {error:.1e}"
            noted.judge("cross_pattern", self._layer, error <= ROWS, text, "eager weights")
        error = difference((self._pattern @ self._v.transpose(0, 1)).transpose(0, 1), self._z)
        for kind in ("cross_v", "cross_z"):
            text = f"pattern @ v differs from z by {error:.1e}"
            noted.judge(kind, self._layer, error <= LOGITS, text, "z = pattern @ v")

    def check_product(self, noted: StackRecord) -> None:
        """Compare the pattern with the softmax of queries and keys."""
        scores = torch.einsum("qhd,khd->hqk", self._q.double(), self._k.double())
        if is_softmax_of(scores, self._pattern.double()):
            for kind in ("cross_q", "cross_k"):
                noted.judge(kind, self._layer, True, "", "softmax of q @ k")


def _stack_with(archives: dict[str, Any], site: str) -> str:
    return next(stack for stack, archive in archives.items() if site in archive.sites)
