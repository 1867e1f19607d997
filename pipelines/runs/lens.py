"""What a model would predict from each layer of a run: the logit lens (nostalgebraist 2020), and tuned lenses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from matplotlib.axes import Axes
from torch import Tensor

from residua.analysis.lens.rows import layer_of
from residua.analysis.support.plots import draw_cells, notebook_axes
from residua.capture.replay.replay import Replay
from residua.pipelines.runs.texts import Texts
from residua.store.base.errors import PlanError

Decode = Callable[[str, Tensor], Tensor]
"""From the name of a site and its rows, (tokens, width) float32 on the CPU, to logits, (tokens, vocabulary)."""

_SCHEMA = pa.schema(
    [
        ("example", pa.int64()),
        ("position", pa.int32()),
        ("token", pa.int32()),
        ("site", pa.string()),
        ("layer", pa.int32()),
        ("top", pa.int32()),
        ("top_text", pa.string()),
        ("top_probability", pa.float32()),
        ("loss", pa.float32()),
        ("kl", pa.float32()),
    ]
)
_LONGEST_LABEL = 10  # letters in a cell


@dataclass(frozen=True, kw_only=True)
class LensView:
    """What is predicted from each layer, at each token.

    Attributes:
        table: One line for each example, layer and position: `site` and `layer` (the number of blocks before it), the
            most probable next token (`top`, `top_text`, `top_probability`), the `loss` of the token that follows, in
            nats (null at the end), and `kl`, the divergence of the lens from what the model itself predicts, in nats.
        sites: The sites, in the model's order.
        title: Name of the lens.
    """

    table: pa.Table
    sites: Sequence[str]
    title: str
    _labels: Sequence[Sequence[str]]

    def plot(self, example: int = 0, *, value: str = "top_probability", ax: Axes | None = None) -> Axes:
        """Draw a heat map over layers and positions, with the most probable token in each cell.

        Args:
            example: Place of the example in the run.
            value: Column that gives the colours: `top_probability`, `kl` or `loss`.
            ax: Axes to draw into; a new figure unless given.

        Raises:
            PlanError: There is no such example, or no such column.
        """
        names = {"top_probability": "probability of the most probable token", "kl": "KL divergence (nats)"}
        names["loss"] = "loss of the next token (nats)"
        if value not in names:
            raise PlanError(f"value={value!r} cannot be drawn: choose one of {', '.join(names)}")
        if not 0 <= example < len(self._labels):
            raise PlanError(f"there is no example {example}: the run has {len(self._labels)}, counted from 0")
        columns = self._labels[example]
        first = sum(map(len, self._labels[:example])) * len(self.sites)
        lines = self.table.slice(first, len(columns) * len(self.sites))
        shape = len(self.sites), len(columns)
        cells = np.array([np.nan if one is None else one for one in lines[value].to_pylist()]).reshape(shape)
        texts = np.array([_short(label) for label in self._top_labels(lines)]).reshape(shape)
        axes = notebook_axes(ax, min(20.0, 3.0 + 0.62 * shape[1]), min(14.0, 1.6 + 0.3 * shape[0]))
        draw_cells(
            axes,
            cells[::-1],  # as in the paper's figures, later layers are higher
            value_name=names[value],
            x_ticks=columns,
            y_ticks=list(self.sites)[::-1],
            texts=texts[::-1].tolist(),
            every_tick=True,
        )
        axes.set_title(self.title)
        axes.set_xlabel("token")
        return axes

    def _top_labels(self, lines: pa.Table) -> list[str]:
        pairs = zip(lines["top_text"].to_pylist(), lines["top"].to_pylist(), strict=True)
        return [str(token) if text is None else repr(text)[1:-1].replace(" ", "\u00b7") for text, token in pairs]


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "\u2026"


def lens_view(run: Replay, rows: dict[str, list[Tensor]], decode: Decode, texts: Texts, title: str) -> LensView:
    """Decode rows of the residual stream.

    Args:
        run: The run.
        rows: From site to its rows in each example, in the model's order.
        decode: The lens.
        texts: The tokenizer.
        title: Name of the lens.
    """
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    for place, (example, tokens) in enumerate(zip(run.examples, run.tokens, strict=True)):
        own = run.logits[place].detach().cpu().float().log_softmax(-1)
        following = torch.tensor(tokens[1:])
        for site, of_site in rows.items():
            logits = decode(site, of_site[place].detach().cpu().float())[:, : own.shape[-1]].log_softmax(-1)
            probability, top = logits.exp().max(-1)
            losses = -logits[:-1].gather(-1, following[:, None])[:, 0]
            columns["example"] += [example] * len(tokens)
            columns["position"] += range(len(tokens))
            columns["token"] += tokens
            columns["site"] += [site] * len(tokens)
            columns["layer"] += [layer_of(site)] * len(tokens)
            columns["top"] += top.tolist()
            columns["top_probability"] += probability.tolist()
            columns["loss"] += [*losses.tolist(), None]
            columns["kl"] += (own.exp() * (own - logits)).nansum(-1).clamp_min(0).tolist()
    known = texts.is_known
    columns["top_text"] = texts.of_each(columns["top"]) if known else [None] * len(columns["top"])
    labels = [texts.labels(tokens) for tokens in run.tokens]
    return LensView(table=pa.table(columns, _SCHEMA), sites=tuple(rows), title=title, _labels=labels)
