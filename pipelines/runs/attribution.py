"""Direct logit attribution: how much each component of a model adds to a logit (Elhage et al. 2021).

The final residual stream is the sum of the embedding and of what each attention and MLP adds. With the scale of the
final norm held fixed, a logit is linear in it, so it is a sum over components, and a bias.

Legend: `D` width of the residual stream.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
from matplotlib.axes import Axes
from torch import Tensor

from residua.analysis.lens.lm_head import LMHead
from residua.analysis.support.plots import notebook_axes
from residua.capture.replay.replay import Replay
from residua.store.base.errors import PlanError

PARTS = ("attn_out", "mixer_out", "mlp_out")
"""Kinds of site whose rows a block adds to the residual stream."""
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_LOW_PRECISION_TOLERANCE = 0.03  # of the largest value of the residual stream
_OTHER = "other"
_SCHEMA = pa.schema(
    [
        ("example", pa.int64()),
        ("position", pa.int32()),
        ("component", pa.string()),
        ("layer", pa.int32()),
        ("contribution", pa.float64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """What each component adds to a logit, or to the difference of two.

    Attributes:
        table: One line for each example and component: `example`, `position`, `component` (``embed``, the sites
            ``attn_out.0``, ``mlp_out.0`` and so on, ``block.0`` where a block's parts do not add up to what it adds,
            ``other`` for what rounding leaves, ``bias``), `layer` (null where there is none) and `contribution`.
        logits: The sum for each example: the logit, before a soft cap if the model has one.
        title: What was attributed.
    """

    table: pa.Table
    logits: Sequence[float]
    title: str

    def plot(self, example: int = 0, *, ax: Axes | None = None) -> Axes:
        """Draw the contributions of one example as bars, the embedding at the top.

        Args:
            example: Place of the example in the run.
            ax: Axes to draw into; a new figure unless given.

        Raises:
            PlanError: There is no such example.
        """
        n_components = self.table.num_rows // len(self.logits)
        if not 0 <= example < len(self.logits):
            raise PlanError(f"there is no example {example}: the run has {len(self.logits)}, counted from 0")
        lines = self.table.slice(example * n_components, n_components)
        names, values = lines["component"].to_pylist(), lines["contribution"].to_pylist()
        axes = notebook_axes(ax, 6.0, min(20.0, 1.2 + 0.22 * n_components))
        colours = ["#0072b2" if value >= 0 else "#d55e00" for value in values]
        axes.barh(range(n_components), values, color=colours)
        axes.set_yticks(range(n_components), names)
        axes.invert_yaxis()
        axes.axvline(0, color="black", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(f"contribution to the logit (sum {self.logits[example]:.3g})")
        axes.set_title(self.title)
        return axes


def attribute_logit(
    run: Replay, head: LMHead, tokens: Sequence[int], position: int, names: Sequence[str]
) -> Attribution:
    """Attribute a logit, or the first of two minus the second; see `residua.pipelines.runs.result.Run.attribution`.

    Args:
        run: The run.
        head: The model's LM head.
        tokens: One token, or two.
        position: Position in each example.
        names: The tokens as the plot shows them.

    Raises:
        PlanError: The head is not linear, or a position or token does not exist.
    """
    lengths = [len(tokens) for tokens in run.tokens]
    shortest = min(lengths)
    if not -shortest <= position < shortest:
        raise PlanError(f"there is no position {position}: the shortest example has {shortest} tokens")
    direction_D, bias = final_direction(head, tokens, [1.0, -1.0][: len(tokens)])
    rows = run.rows(["resid_pre.*", "resid_post.*", *(f"{kind}.*" for kind in PARTS if run.has_sites(kind))])
    dtype = rows["resid_pre.0"][0].dtype
    lines: dict[str, list[object]] = {name: [] for name in _SCHEMA.names}
    logits = []
    for place, example in enumerate(run.examples):
        found = components_of({name: values[place][position] for name, values in rows.items()}, dtype)
        final = sum(found.values(), torch.zeros_like(direction_D))
        added = {**contributions(head, found, final, direction_D), "bias": bias}
        logits.append(sum(added.values()))
        lines["example"] += [example] * len(added)
        lines["position"] += [position % lengths[place]] * len(added)
        lines["component"] += list(added)
        lines["layer"] += [int(name.rpartition(".")[2]) if "." in name else None for name in added]
        lines["contribution"] += list(added.values())
    title = f"direct attribution of {' minus '.join(names)}"
    return Attribution(table=pa.table(lines, _SCHEMA), logits=logits, title=title)


def final_direction(head: LMHead, tokens: Sequence[int], signs: Sequence[float]) -> tuple[Tensor, float]:
    """Return the direction in the normalised final stream that a sum of logits reads, float64 (width), and its bias.

    Args:
        head: The LM head.
        tokens: The tokens whose logits are added.
        signs: The factor of each.

    Raises:
        PlanError: The head has an activation, so logits are no sum over components; or there is no such token.
    """
    if head.spec.activation is not None:
        raise PlanError(
            "the LM head of this model has a layer with an activation before the unembedding, so its logits are no sum "
            "over components: attribute sites with run.gradients, or patch them"
        )
    get = head.parameters.get
    wrong = [token for token in tokens if not 0 <= token < head.vocabulary_size]
    if wrong:
        raise PlanError(f"there is no token {wrong[0]}: the model has logits of tokens 0 to {head.vocabulary_size - 1}")
    factors = torch.tensor(signs, dtype=torch.float64)
    inner = factors @ head.parameters["unembed.weight"][list(tokens)].double()
    unembed_bias = get("unembed.bias")
    bias = 0.0 if unembed_bias is None else float(factors @ unembed_bias[list(tokens)].double())
    project_out = get("project_out.weight")
    direction_D = inner if project_out is None else inner @ project_out.double()
    norm_bias, weight = get("norm.bias"), get("norm.weight")
    if norm_bias is not None:
        bias += float(direction_D @ norm_bias.double())
    if weight is not None:
        direction_D = direction_D * (head.spec.weight_offset + weight.double())
    return direction_D * head.spec.logit_scale, bias * head.spec.logit_scale


def contributions(
    head: LMHead, components: Mapping[str, Tensor], final: Tensor, direction_D: Tensor
) -> dict[str, float]:
    """Return what each component adds along a direction of the normalised final stream, whose scale is held fixed.

    Args:
        head: The LM head.
        components: From name to what it adds to the final residual stream, float64 (width).
        final: The final residual stream, float64 (width).
        direction_D: As `final_direction` says.
    """
    is_layer, eps = head.spec.norm == "layer", head.spec.eps

    def centred(values: Tensor) -> Tensor:
        return values - values.mean() if is_layer else values

    scale = torch.ones(()) if head.spec.norm == "none" else (centred(final).pow(2).mean() + eps).sqrt()
    return {name: float(centred(values) @ direction_D / scale) for name, values in components.items()}


def components_of(rows: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what each component adds to the final residual stream at one token, float64 (width).

    Args:
        rows: Rows of that token at `resid_pre.*`, `resid_post.*` and the kinds of `PARTS`, (width) each.
        dtype: The type in which the model computed them.
    """
    wide = {name: values.detach().cpu().double() for name, values in rows.items()}
    n_blocks = sum(name.startswith("resid_post.") for name in wide)
    found = {"embed": wide["resid_pre.0"]}
    for layer in range(n_blocks):
        before, after = wide[f"resid_pre.{layer}"], wide[f"resid_post.{layer}"]
        parts = {name: wide[name] for kind in PARTS if (name := f"{kind}.{layer}") in wide}
        rest = after - before - sum(parts.values(), torch.zeros_like(after))
        limit = _TOLERANCE.get(dtype, _LOW_PRECISION_TOLERANCE) * float(after.abs().max())
        found |= parts if parts and float(rest.abs().max()) <= limit else {f"block.{layer}": after - before}
    found[_OTHER] = wide[f"resid_post.{n_blocks - 1}"] - sum(found.values(), torch.zeros_like(found["embed"]))
    return found
