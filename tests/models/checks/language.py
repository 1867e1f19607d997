"""What is checked of a language model over tokens: every site that it offers, against what transformers gives.

Each check notes in the `Record` which blocks it proved, and what is wrong. None of them asks Residua what it should
find: hidden states, eager attention weights, the modules' own inputs and outputs, and identities decide.
"""

import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import residua
from residua.capture.sites.names_to_modules import resolve_sites
from residua.store.base.errors import UnknownSiteError
from tests.models.checks.experts import check_experts, check_latent
from tests.models.checks.truth import LOGITS, ROWS, StackTruth, Truth, difference, eager, examples_of, is_same
from tests.models.findings import ATTENTION, Record, StackRecord

STREAM = ("resid_pre", "resid_mid", "resid_post")
SUMMANDS = ("attn_out", "mixer_out", "cross_attn_out", "mlp_out")
EXPERT_KINDS = ("router_logits", "expert_index", "expert_weight", "routed_out", "shared_out")
_SMALLEST_WEIGHT = 1e-20  # whose logarithm is still known in float32
_NORM = re.compile(r"norm|ln_?[0-9]|pre_ln")
LAYER_KINDS = (*STREAM, *ATTENTION, *SUMMANDS, "mlp_act")


def check_language_model(model: PreTrainedModel, record: Record) -> None:
    """Check all that a model offers; what it lacks is noted with the reason that Residua gives."""
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 97) or 97)
    truth = Truth(model, examples_of(min(vocabulary, 97)))
    record.runs = True
    if not truth.is_finite:
        record.note_wrong("logits", "the model's own logits are not finite")
        return
    sites = record.attempt("sites", residua.model_sites, model)
    if sites is None:
        return
    record.n_blocks = _n_blocks(model, sites, truth)
    record.offer(sites)
    with tempfile.TemporaryDirectory() as folder:
        rows = _capture(model, record, sites, truth, Path(folder))
        if rows is None:
            return
        check = Checks(model, record, sites, truth, rows)
        check.all()
        record.attempt("replay", check.replayed, "resid_post")
        record.attempt("modules", check.modules, Path(folder))
    record.attempt("reasons", note_reasons, model, record, sites)


def _n_blocks(model: PreTrainedModel, sites: dict[str, Any], truth: Truth) -> int:
    config = model.config.get_text_config()
    counted = next(
        (getattr(config, n) for n in ("num_hidden_layers", "n_layer", "num_layers") if hasattr(config, n)), 0
    )
    numbers = [int(name.rpartition(".")[2]) for name in sites if name.rpartition(".")[2].isdigit()]
    return max([0, *(number + 1 for number in numbers)]) or int(counted or len(truth.hidden[0] or (0,)) - 1)


class Rows:
    """Rows of the examples of an archive, as float32 tensors."""

    def __init__(self, archives: Iterable[Any]) -> None:
        self.archives = list(archives)
        self._read: dict[tuple[int, str], Tensor] = {}

    def __call__(self, example: int, site: str) -> Tensor:
        """Return one example's rows of a site, (tokens, *row)."""
        if (example, site) not in self._read:
            archive = next(each for each in self.archives if site in each.sites)
            rows = archive.example(example, site)[site][:]
            self._read[example, site] = torch.as_tensor(rows.astype("float32"))
        return self._read[example, site]


def _capture(model: PreTrainedModel, record: Record, sites: Iterable[str], truth: Truth, folder: Path) -> Rows | None:
    """Capture all sites: patterns in an archive of their own, since they need eager attention."""
    patterns = [name for name in sites if name.startswith("pattern.")]
    others = [name for name in sites if name not in patterns]
    archives = []
    for name, chosen in (("rows", others), ("patterns", patterns)):
        if chosen:
            result = record.attempt(
                f"capture of {name}",
                residua.capture_dataset,
                model,
                truth.ids,
                sites=",".join(chosen),
                out=folder / name,
            )
            if result is not None:
                archives.append(result.archive)
                record.notes = list(dict.fromkeys([*record.notes, *result.notes]))
    return Rows(archives) if archives else None


class Checks:
    """The checks of the rows of one model, or of one stack of it, whose sites are named here without its prefix.

    Args:
        model: The model, with the modules that the sites name.
        record: Where findings are noted.
        sites: The sites.
        truth: What the model itself gives.
        rows: What was captured.
        prefix: What the names of the sites begin with in `tapped`.
        tapped: The model that the truth runs, if that is a part of `model`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        record: Record | StackRecord,
        sites: Mapping[str, Any],
        truth: Truth | StackTruth,
        rows: Rows,
        prefix: str = "",
        tapped: PreTrainedModel | None = None,
    ) -> None:
        self.model = model
        self.prefix = prefix
        self.tapped = tapped or model
        self.record = record
        self.sites = {name: info for name, info in sites.items() if any(name in each.sites for each in rows.archives)}
        self.truth = truth
        self.rows = rows
        self.last = len(truth.ids) - 1

    def all(self) -> None:
        """Make the checks that need no more than rows and what the model itself gave, and put rows back."""
        checks = (self.logits, self.residual, self.patterns, self.values, self.queries)
        parts = (*checks, self.sums, self.acts, self.experts)
        for part in parts:
            self.record.attempt(part.__name__, part)
        self.record.attempt("replacement", self.replacements)

    def layers(self, kind: str) -> list[int]:
        """Return the blocks whose rows of a kind were captured."""
        return [int(n.rpartition(".")[2]) for n in self.sites if n.rpartition(".")[0] == kind]

    def logits(self) -> None:
        """Logits are those of each example alone."""
        if "logits" in self.sites:
            worst = max(difference(self.rows(i, "logits"), each) for i, each in enumerate(self.truth.logits))
            self.record.judge("logits", None, worst <= LOGITS, f"logits differ by {worst:.1e}", "the model's own")

    def residual(self) -> None:
        """`resid_post` is the hidden state behind each block; `resid_pre` is that of the block before."""
        shift = self._first_state()
        for layer in self.layers("resid_post"):
            error, how = self._state_error(f"resid_post.{layer}", layer, shift)
            self.record.judge("resid_post", layer, error <= ROWS, f"differs from the {how} by {error:.1e}", how)
        for layer in self.layers("resid_pre"):
            error, how = self._state_error(f"resid_pre.{layer}", layer - 1, shift)
            self.record.judge("resid_pre", layer, error <= ROWS, f"differs from the {how} by {error:.1e}", how)

    def _first_state(self) -> int:
        """Return which hidden state is that behind block 0: the second, unless the list lacks the embeddings."""
        hidden, layers = self.truth.hidden, self.layers("resid_post")
        if hidden[0] is None or 0 not in layers or len(hidden[0]) < 2:
            return 1
        row = self.rows(self.last, "resid_post.0")
        states = hidden[self.last]
        return (
            0
            if states is not None and _state_difference(row, states[1]) > ROWS >= _state_difference(row, states[0])
            else 1
        )

    def _state_error(self, site: str, layer: int, shift: int) -> tuple[float, str]:
        hidden = self.truth.hidden[0]
        n = len(self.layers("resid_post"))
        if hidden is not None and 0 <= layer + shift < len(hidden) - 1 and len(hidden) in (n, n + 1):
            errors = [
                _state_difference(self.rows(i, site), states[layer + shift])
                for i, states in enumerate(self.truth.hidden)
                if states is not None
            ]
            return max(errors), "hidden state"
        row = self.rows(self.last, site)
        if hidden is not None and _state_difference(row, self.truth.hidden[self.last][-1]) <= ROWS:  # type: ignore[index]
            return 0.0, "hidden state"
        errors = [_state_difference(row, given) for given in self._block_outputs(layer)]
        return min(errors, default=float("inf")), "block's output"

    def _block_outputs(self, layer: int) -> list[Tensor]:
        """Return what members with this number give, in lists of modules that run once each, one after another.

        A member that does not run, such as a block that attends to an image, is passed by.
        """
        log, states = self.truth.log, self.truth.hidden[self.last] or ()
        found = []
        for path, module in self.model.named_modules():
            if not isinstance(module, nn.ModuleList) or not layer < len(module):
                continue
            given = [log.given.get(f"{path}.{k}", []) for k in range(len(module))]
            taken = [log.taken.get(f"{path}.{k}", []) for k in range(len(module))]
            ran = [k for k in range(len(module)) if given[k]]
            below = [k for k in ran if k <= layer]
            once = all(len(each[k]) == 1 for each in (given, taken) for k in ran)
            if not ran or not once or not (below or layer < 0):
                continue
            are_states = all(any(is_same(given[k][0], state) for state in states) for k in ran[:-1])
            follow = all(is_same(given[k][0], taken[up][0]) for k, up in pairwise(ran))
            if follow or (states and are_states):
                found.append(given[below[-1]][0] if layer >= 0 else taken[ran[0]][0])
        return found

    def patterns(self) -> None:
        """`pattern` is what the model returns as attention weights under eager attention."""
        layers = self.layers("pattern")
        weights = [_usable(each) for each in self.truth.weights]
        n = len(weights[0])
        if n not in (len(layers), self.record.n_blocks):
            return
        for place, layer in enumerate(layers):
            at = layer if n == self.record.n_blocks else place
            errors = [self._weight_error(i, layer, each[at]) for i, each in enumerate(weights) if at < len(each)]
            known = [error for error in errors if error is not None]
            if known and len(known) == len(weights):
                text = f"differs from the eager weights by {max(known):.1e}"
                self.record.judge("pattern", layer, max(known) <= ROWS, text, "eager weights")

    def _weight_error(self, i: int, layer: int, weight: Tensor | None) -> float | None:
        if weight is None:
            return None
        n = len(self.truth.ids[i])
        found = self.rows(i, f"pattern.{layer}").permute(1, 0, 2)[:, :, :n]
        return difference(found, weight[0][..., -n:].float())

    def values(self) -> None:
        """`z` is `pattern @ v`, and what the output projection takes; that proves `v` too."""
        for layer in self.layers("z"):
            z = self.rows(self.last, f"z.{layer}")
            projected = self._taken_in_block(layer, z)
            if projected:
                self.record.judge("z", layer, True, "", "input of its projection")
            if layer not in self.layers("v") or layer not in self.layers("pattern"):
                continue
            error = max(self._weighted_error(i, layer) for i in range(len(self.truth.ids)))
            if error <= LOGITS:
                self.record.judge("v", layer, True, "", "z = pattern @ v")
                self.record.judge("z", layer, True, "", "z = pattern @ v")
                self.record.judge("pattern", layer, True, "", "z = pattern @ v")
            elif not projected:
                self.record.judge(
                    "z", layer, False, f"pattern @ v differs by {error:.1e}, and no projection takes it", ""
                )
            else:
                self.record.remark(f"z.{layer} is not pattern @ v (by {error:.1e})")

    def _weighted_error(self, i: int, layer: int) -> float:
        pattern = self.rows(i, f"pattern.{layer}").permute(1, 0, 2)[:, :, : len(self.truth.ids[i])]
        v, z = self.rows(i, f"v.{layer}"), self.rows(i, f"z.{layer}")
        if v.ndim != 3 or pattern.shape[0] % v.shape[1] or pattern.shape[-1] != v.shape[0]:
            return float("inf")
        each = v.repeat_interleave(pattern.shape[0] // v.shape[1], dim=1).transpose(0, 1)
        return difference((pattern @ each).transpose(0, 1), z)

    def _taken_in_block(self, layer: int, rows: Tensor) -> list[str]:
        """Return the linear maps of a block that take these rows, as they are, in an ordinary run."""
        site = next((self.sites[n] for n in (f"resid_post.{layer}", f"z.{layer}") if n in self.sites), None)
        block = "" if site is None else site.module
        return [
            path
            for path, taken in self.truth.log.taken.items()
            if path.startswith(f"{block}.")
            and _is_linear(self.model.get_submodule(path))
            and any(is_same(each.float(), rows) for each in taken)
        ]

    def queries(self) -> None:
        """The logarithm of `pattern` is the product of `q` and `k`, scaled, up to a constant for each query."""
        config = self.model.config.get_text_config()
        cap = getattr(config, "attn_logit_softcapping", None)
        for layer in self.layers("q"):
            if layer not in self.layers("k") or layer not in self.layers("pattern"):
                continue
            q, k = self.rows(self.last, f"q.{layer}"), self.rows(self.last, f"k.{layer}")
            pattern = self.rows(self.last, f"pattern.{layer}").permute(1, 0, 2)[:, :, : q.shape[0]]
            if q.ndim != 3 or k.ndim != 3 or q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
                self.record.judge("q", layer, False, f"q {tuple(q.shape)} and k {tuple(k.shape)} make no product", "")
                continue
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            scores = torch.einsum("qhd,khd->hqk", q.double(), k.double())
            if is_softmax_of(scores, pattern.double(), None if cap is None else float(cap), _scale(config)):
                for kind in ("q", "k"):
                    self.record.judge(kind, layer, True, "", "softmax of q @ k")

    def sums(self) -> None:
        """What a block's parts give adds up to what it adds to the stream, in the way of that block."""
        for layer in self.layers("resid_post"):
            kinds = [kind for kind in SUMMANDS if layer in self.layers(kind)]
            block = self.sites[f"resid_post.{layer}"].module
            adds_more = any(path.startswith(f"{block}.crossattention.") for path in self.truth.log.given)
            if kinds and layer in self.layers("resid_pre") and not (adds_more and "cross_attn_out" not in kinds):
                self._sum_of(layer, kinds)

    def experts(self) -> None:
        """The routing of experts, what they give, and the latent of keys and values."""
        for layer in range(self.record.n_blocks):
            kinds = [*EXPERT_KINDS, "mlp_out", "kv_latent", "v"]
            rows = {kind: self.rows(self.last, f"{kind}.{layer}") for kind in kinds if f"{kind}.{layer}" in self.sites}
            check_experts(self.model, self.record, self.truth.log, layer, rows)
            if {"kv_latent", "v"} <= set(rows):
                check_latent(self.model, self.record, self.truth.log, layer, rows)

    def _sum_of(self, layer: int, kinds: list[str]) -> None:
        get: Callable[[str], Tensor] = lambda kind: self.rows(self.last, f"{kind}.{layer}").double()  # noqa: E731
        pre, post = get("resid_pre"), get("resid_post")
        parts = {kind: get(kind) for kind in kinds}
        middle = get("resid_mid") if layer in self.layers("resid_mid") else None
        how = self._way_of(layer, pre, post, parts, middle)
        text = f"resid_pre + {' + '.join(kinds)} is not what block {layer} makes of its input"
        for kind in (*kinds, *(("resid_mid",) if middle is not None else ())):
            self.record.judge(kind, layer, bool(how), text, how)

    def _way_of(self, layer: int, pre: Tensor, post: Tensor, parts: dict[str, Tensor], middle: Tensor | None) -> str:
        if middle is None:
            how = self._is_stream(layer, post - sum(parts.values()), pre)
            return how or self._with_rest(layer, pre, post, parts)
        before = [part for kind, part in parts.items() if kind in ("attn_out", "mixer_out")]
        first = torch.stack(before).sum(0) if before else None
        halves = []
        if first is not None:
            halves.append(self._is_stream(layer, middle - first, pre) or self._is_normed(layer, first, pre, middle))
        if "mlp_out" in parts:
            streams = (
                self._after_cross(layer, middle, parts["cross_attn_out"]) if "cross_attn_out" in parts else [middle]
            )
            last = parts["mlp_out"]
            ways = (
                self._is_stream(layer, post - last, each) or self._is_normed(layer, last, each, post)
                for each in streams
            )
            halves.append(next((way for way in ways if way), ""))
        if halves and all(halves):
            return " and ".join(dict.fromkeys(halves))
        return self._with_rest(layer, pre, post, parts)

    def _after_cross(self, layer: int, middle: Tensor, cross: Tensor) -> list[Tensor]:
        """Return what the stream may be behind attention to the source: the sum, or what a norm makes of it."""
        log, block = self.truth.log, self.sites[f"resid_post.{layer}"].module
        normed = [
            given.double().reshape(middle.shape)
            for path, found in log.given.items()
            if path.startswith(f"{block}.")
            for taken, given in zip(log.taken.get(path, []), found, strict=False)
            if taken.numel() == middle.numel() == given.numel() and is_same(taken.double(), middle + cross)
        ]
        return [middle + cross, *normed]

    def _is_stream(self, layer: int, left: Tensor, stream: Tensor) -> str:
        """Say whether what is left without the parts is the stream, a multiple of it, or a norm of it."""
        if is_same(left, stream):
            return "sum"
        bases = [("sum with a multiple of the stream", stream)]
        bases += [("sum with a norm of the stream", _given_by(norm, stream)) for norm in self._norms(layer)]
        for how, base in bases:
            if base.shape == left.shape:
                factor = float((left * base).sum() / base.square().sum())
                if abs(factor) > ROWS and is_same(left, factor * base):
                    return how
        return ""

    def _is_normed(self, layer: int, parts: Tensor, stream: Tensor, goal: Tensor) -> str:
        """Say whether a norm of the block took the parts with a multiple of the stream, and gave the other."""
        log, block = self.truth.log, self.sites[f"resid_post.{layer}"].module
        for path, given in log.given.items():
            if path.startswith(f"{block}.") and any(is_same(each.double(), goal) for each in given):
                taken = [
                    each.double().reshape(goal.shape)
                    for each in log.taken.get(path, [])
                    if each.numel() == goal.numel()
                ]
                if any(self._is_stream(layer, each - parts, stream) for each in taken):
                    return "norms of the sums"
        return ""

    def _norms(self, layer: int) -> list[nn.Module]:
        block = self.model.get_submodule(self.sites[f"resid_post.{layer}"].module)
        return [each for name, each in block.named_modules() if _NORM.search(f"{name}{type(each).__name__}".lower())]

    def _with_rest(self, layer: int, pre: Tensor, post: Tensor, parts: dict[str, Tensor]) -> str:
        """What is missing in the sum is what another module of the block gives."""
        rest = post - pre - sum(parts.values())
        block = self.sites[f"resid_post.{layer}"].module
        for path, given in self.truth.log.given.items():
            if path.startswith(f"{block}.") and any(is_same(each.double(), rest) for each in given):
                return f"sum with {path.removeprefix(f'{block}.')}"
        return ""

    def acts(self) -> None:
        """`mlp_act` is what a linear map takes whose output is `mlp_out`, or becomes it in one module more."""
        for layer in self.layers("mlp_act"):
            act = self.rows(self.last, f"mlp_act.{layer}")
            out = self.rows(self.last, f"mlp_out.{layer}") if layer in self.layers("mlp_out") else None
            takers = self._taken_in_block(layer, act)
            good = [path for path in takers if out is None or self._becomes(layer, path, out)]
            text = f"no linear map of block {layer} takes it and gives mlp_out"
            self.record.judge("mlp_act", layer, bool(good), text, "input of the last linear map")

    def _becomes(self, layer: int, path: str, out: Tensor) -> bool:
        log = self.truth.log
        given = log.given[path][0].float()
        if given.numel() == out.numel() and is_same(given * _factor(given.reshape(out.shape), out), out):
            return True  # the block multiplies it, or does not
        if layer in self.layers("resid_mid") and is_same(given, self.rows(self.last, f"resid_mid.{layer}") + out):
            return True  # Bloom's linear map adds the stream itself
        followed = [p for p, taken in log.taken.items() if any(is_same(each.float(), given) for each in taken)]
        then = [
            each.float().reshape(out.shape)
            for p in followed
            for each in log.given.get(p, [])
            if each.numel() == out.numel()
        ]
        return any(is_same(each * _factor(each, out), out) for each in then)

    def replayed(self, kind: str) -> None:
        """A replay from a middle block gives the logits of each example alone, and an edit there moves them."""
        layers = self.layers(kind)
        if not layers or "logits" not in self.sites:
            return
        site = f"{kind}.{layers[(len(layers) - 1) // 2]}"
        archive = next(each for each in self.rows.archives if site in each.sites)
        batch = list(archive.batch_of(self.last))
        with residua.replay(self.model, archive, examples=batch, at=site) as again:
            worst = max(difference(again.logits[j], self.truth.logits[e]) for j, e in enumerate(batch))
            self.record.note_replay(again.notes)
        self.record.judge(
            "replay", None, worst <= LOGITS, f"a replay from {site} gives other logits ({worst:.1e})", site
        )
        edit = {"edit": "scale", "site": site, "by": -0.5}
        with residua.replay(self.model, archive, examples=[self.last], at=site, edits=[edit]) as again:
            moved = difference(again.logits[0], self.truth.logits[self.last])
        self.record.judge("edit", None, moved > ROWS, f"an edit at {site} changes no logits", site)

    def replacements(self) -> None:
        """What is put back unchanged changes nothing, and what is changed acts, at one site of each kind."""
        kinds = [kind for kind in LAYER_KINDS if self.layers(kind)]
        patterns = [kind for kind in kinds if kind.endswith("pattern")]
        with eager(self.tapped):
            self._replace(patterns)
        self._replace([kind for kind in kinds if kind not in patterns])

    def _replace(self, kinds: list[str]) -> None:
        if not kinds:
            return
        names = {kind: [f"{self.prefix}{kind}.{layer}" for layer in self.layers(kind)] for kind in kinds}
        unchanged: list[str] = []
        changed = ""

        def exchange(name: str, tensor: Tensor) -> Tensor | None:
            if name == changed:
                return tensor * 0.25 + tensor.flip(-1) * 0.5
            return tensor.clone() if name in unchanged else None

        plain = self.truth.again()
        with residua.tap(self.tapped, [name for of_kind in names.values() for name in of_kind], exchange):
            for kind, of_kind in names.items():
                unchanged, changed = of_kind, ""
                same = difference(self.truth.again(), plain)
                if same > LOGITS:
                    self.record.note_wrong(kind, f"{kind} put back unchanged changes the logits by {same:.1e}")
                unchanged, changed = [], of_kind[len(of_kind) // 2]
                if difference(self.truth.again(), plain) == 0.0:
                    self.record.note_wrong(kind, f"another value at {changed} changes nothing")

    def modules(self, folder: Path) -> None:
        """`module:` sites of a middle block and its parts are what the modules give."""
        site = next((info for n, info in self.sites.items() if n.startswith("resid_post.")), None)
        paths = _middle_paths(self.model, self.truth.log.given, None if site is None else site.module)
        shown, tokens = {}, len(self.truth.ids[self.last])
        for path in paths:
            given = self.truth.log.given[path]
            by_token = given[0].shape[:2] == (1, tokens) or (given[0].ndim == 2 and given[0].shape[0] == tokens)
            if len(given) == 1 and by_token:
                shown[f"module:{path}@output"] = given[0]
        self.record.count_modules(len(shown))
        if not shown:
            return
        result = residua.capture_dataset(
            self.model, self.truth.ids, sites=",".join(shown), out=folder / "modules", codec="raw"
        )
        rows = Rows([result.archive])
        for name, expected in shown.items():
            good = is_same(rows(self.last, name), expected.float())
            self.record.judge("module", None, good, f"rows of {name} are not what the module gives", "module outputs")


def _state_difference(rows: Tensor, state: Tensor) -> float:
    """Compare rows, (tokens, *row), with a state that has a batch axis of one, and streams before or behind it."""
    state = state.float()
    if state.ndim == 4 and rows.ndim == 3:
        state = state.squeeze(1).transpose(0, 1) if state.shape[1] == 1 else state[0]
        return difference(rows, state)
    if rows.numel() != state.numel():
        return float("inf")
    return difference(rows.reshape(-1), state.reshape(-1))


def _usable(weights: tuple[Tensor | None, ...] | None) -> list[Tensor | None]:
    found = list(weights or ())
    return [each if isinstance(each, Tensor) and each.ndim == 4 else None for each in found]


def _factor(given: Tensor, wanted: Tensor) -> float:
    return float((given * wanted).sum() / given.square().sum().clamp_min(1e-12))


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def _given_by(module: nn.Module, rows: Tensor) -> Tensor:
    with torch.no_grad():
        try:
            given = module(rows.float()[None])
        except Exception:  # noqa: BLE001 - a module of another signature is not the norm that is looked for
            return torch.zeros(0)
    return given[0].double() if isinstance(given, Tensor) else torch.zeros(0)


def _scale(config: Any) -> float | None:
    scalar = getattr(config, "query_pre_attn_scalar", None)
    return None if scalar is None else float(scalar) ** -0.5


def is_softmax_of(scores: Tensor, pattern: Tensor, cap: float | None = None, scale: float | None = None) -> bool:
    """Fit the logarithm of each head's pattern by its scores, a number for each query and one for each distance."""
    if cap is not None and scale is not None:
        scores = cap * torch.tanh(scores * scale / cap)
    n_queries, n_keys = pattern.shape[1:]
    distances = torch.arange(n_keys)[None] - torch.arange(n_queries)[:, None] + n_queries - 1
    biases = torch.nn.functional.one_hot(distances, n_queries + n_keys - 1).double()  # of T5, ALiBi and the like
    for head_scores, head in zip(scores, pattern, strict=True):
        seen = head > _SMALLEST_WEIGHT
        seen &= seen.sum(1, keepdim=True) > 2
        if int(seen.sum()) < 2 * (n_queries + n_keys):
            return False
        weight = seen.double()[..., None]
        n = weight.sum(1, keepdim=True).clamp_min(1)
        goal_QK1 = head.clamp_min(_SMALLEST_WEIGHT).log()[..., None]
        each = torch.cat([head_scores[..., None], biases, goal_QK1], -1)
        centred = (each - (each * weight).sum(1, keepdim=True) / n)[seen]
        columns, goal = centred[:, :-1], centred[:, -1]
        fitted = columns @ torch.linalg.lstsq(columns, goal[:, None], driver="gelsd").solution[:, 0]
        if float((fitted - goal).abs().max()) > 2e-3 * float(goal.abs().max().clamp_min(1e-3)):
            return False
    return True


def _middle_paths(model: PreTrainedModel, given: dict[str, list[Tensor]], block: str | None) -> list[str]:
    if block is None:
        lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
        block = f"{min(lists, key=lambda name: name.count('.'))}.0" if lists else ""
    if not block:
        return []
    inside = [f"{block}.{name}" for name, _ in model.get_submodule(block).named_children()]
    return [path for path in (block, *inside) if path in given]


def note_reasons(
    model: PreTrainedModel, record: Record, sites: Mapping[str, Any], stacks: Sequence[str] = ("",)
) -> None:
    """Ask for every kind that is lacking, in whole or in a block; the message names type, site, cause and a way out."""
    record.refusal = " ".join(_refusal(model, record, sites, f"{stack}." if stack else "") for stack in stacks)


def _refusal(model: PreTrainedModel, record: Record, sites: Mapping[str, Any], prefix: str) -> str:
    lacking = []
    for kind in (*STREAM, *ATTENTION, "attn_out", "mlp_out", "mlp_act"):
        missing = [layer for layer in range(max(record.n_blocks, 1)) if f"{prefix}{kind}.{layer}" not in sites]
        if missing:
            lacking.append(f"{prefix}{kind}.{missing[0]}")
    if not lacking:
        return ""
    try:
        resolve_sites(model, lacking)
    except UnknownSiteError as error:
        text = str(error)
        names = (type(model).__name__, str(model.config.get_text_config().model_type), str(model.config.model_type))
        if not any(name in text for name in names):
            record.note_wrong("refusal", f"the message names no type: {text[:200]}")
        if "module:" not in text and "use " not in text.lower():
            record.note_wrong("refusal", f"the message says nothing that works: {text[:200]}")
        return text
    record.note_wrong("refusal", f"{lacking[0]} is not offered, and not refused")
    return ""
