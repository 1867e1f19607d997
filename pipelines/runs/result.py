"""What `residua.run` returns and `residua.replay` yields: logits and sites, texts, views, and an archive of it all."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import torch

from residua.capture.identity.fingerprint import WeightsSeen
from residua.capture.identity.lm_head import lm_head_of
from residua.capture.replay.engine import Replayer
from residua.capture.replay.replay import Replay
from residua.capture.replay.result_memory import ResultMemory
from residua.pipelines.runs.texts import Texts
from residua.store.base.errors import CaptureError, PlanError
from residua.store.base.extras import load
from residua.store.encoding.codecs import DEFAULT_PRESET
from residua.store.read.archive import Archive

if TYPE_CHECKING:  # views need the packages of the extra `analysis`, and runs do not
    from matplotlib.axes import Axes

    from residua.analysis.lens.lens import TunedLens
    from residua.analysis.lens.lm_head import LMHead
    from residua.pipelines.runs.attribution import Attribution
    from residua.pipelines.runs.lens import LensView


class Run(Replay):
    """The results of a model over some examples, with edits.

    ``run["resid_post.7"][0]`` are the rows of a site in example 0; the model runs once more for a site that was not
    kept. Attributes and other methods are those of `residua.capture.replay.replay.Replay`.

    Args:
        replayer: Runs the model.
        examples: Numbers of the examples.
        keep: Sites that the first pass keeps.
        grad: Whether logits and kept rows are part of autograd's graph.
        texts: The tokenizer.
        ready: As for `Replay`.
        memory: As for `Replay`.
        weights: The weights of the model as they were for the first pass; later passes need the same.
    """

    def __init__(
        self,
        replayer: Replayer,
        examples: Sequence[int],
        keep: Sequence[str],
        *,
        grad: bool,
        texts: Texts,
        ready: Callable[[], AbstractContextManager[object]] = nullcontext,
        memory: ResultMemory | None = None,
        weights: WeightsSeen | None = None,
    ) -> None:
        super().__init__(replayer, examples, keep, grad=grad, ready=ready, memory=memory)
        self._texts = texts
        self._weights = weights
        self._head: LMHead | None = None

    @contextmanager
    def _running(self) -> Iterator[None]:
        if self._weights is not None and self._weights.have_changed():
            raise CaptureError(
                "the model's weights have changed since this run, so what it gives now does not belong to the results "
                "so far: call residua.run again"
            )
        with super()._running():
            yield

    def text(self, example: int) -> str:
        """Return the text of the example at a place in `examples`, special tokens included.

        Raises:
            PlanError: There is no tokenizer.
        """
        return self.decode(self.tokens[example])

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of token ids, such as those that `generate` returns.

        Raises:
            PlanError: There is no tokenizer.
        """
        return self._texts.text(list(tokens))

    def save(
        self,
        out: str | PathLike[str],
        *,
        dtype: str | None = None,
        codec: str = DEFAULT_PRESET,
        storage_options: Mapping[str, Any] | None = None,
    ) -> Archive:
        """Capture `sites` of these examples, with the edits, as an archive; the model runs once more.

        Args:
            out: Folder of the archive, or its address in a bucket (``s3://``, ``gs://``, ``az://``).
            dtype: Data type to store; by default each site's own.
            codec: Codec preset.
            storage_options: For an address, as for `residua.open`.

        Returns:
            The archive, sealed. Its provenance has the edits.

        Raises:
            PlanError: No site was kept, this is a replay (`residua.replay_dataset` captures those), or `out` is an
                archive of another run.
            CaptureError: The model's weights have changed since the run.
            OSError: The place cannot be written.
        """
        from residua.pipelines.runs.save import save_run  # which needs all that a capture needs

        with self._running():
            return save_run(
                self._replayer,
                self.sites,
                out,
                texts=self._texts,
                dtype=dtype,
                codec=codec,
                storage_options=storage_options,
            )

    def table(self) -> pa.Table:
        """Return one line for each token of each example; ``.to_pandas()`` makes a data frame of it.

        The columns are `example`, `position`, `token`, `text` (null without a tokenizer, and for a part of a
        character), and, of a model that predicts the next token, what it predicts there: `loss` of the next token in
        nats (null for the last one), `top` (the most probable token), `top_text` and `top_probability`.
        """
        from residua.pipelines.runs.table import token_table

        return token_table(self, self._texts, predicts=self._replayer.predicts_next)

    def logit_lens(self) -> "LensView":
        """Decode the residual stream of every layer with the model's own LM head.

        Returns:
            A table, and a heat map over layers and positions: ``run.logit_lens().plot()``.

        Raises:
            PlanError: The model's LM head is not known.
        """
        lens_view = load("pipelines.runs.lens:lens_view", "run.logit_lens")
        from residua.analysis.lens.unembedding import Decoder

        decoder = Decoder(self._lm_head())
        rows = self.rows(["resid_pre.0", "resid_post.*"])
        view: LensView = lens_view(self, rows, lambda _, hidden: decoder.logits(hidden), self._texts, "logit lens")
        return view

    def tuned_lens(self, lens: "TunedLens | str | PathLike[str]") -> "LensView":
        """Decode the residual stream of every layer that a tuned lens was trained at.

        Args:
            lens: The lens, or its folder.

        Raises:
            AnalysisError: There is no such lens.
            PlanError: It is one of a model with another LM head.
        """
        lens_view = load("pipelines.runs.lens:lens_view", "run.tuned_lens")
        from residua.analysis.lens.lens import TunedLens
        from residua.analysis.lens.rows import layer_of

        found = lens if isinstance(lens, TunedLens) else TunedLens.load(lens)
        ours, theirs = (head.parameters["unembed.weight"] for head in (self._lm_head(), found.head))
        if ours.shape != theirs.shape or not torch.equal(ours.float(), theirs.float()):
            raise PlanError(
                f"the lens is one of {found.config.base_model_name_or_path or 'another model'}, whose unembedding is "
                "not that of this model: train a lens on an archive of this model"
            )
        layers = {*found.translators, found.config.num_hidden_layers}
        known = ["resid_pre.0", *(f"resid_post.{layer}" for layer in range(found.config.num_hidden_layers))]
        rows = self.rows([site for site in known if layer_of(site) in layers])
        view: LensView = lens_view(self, rows, found.decode, self._texts, "tuned lens")
        return view

    def attribution(
        self,
        metric: Literal["logit", "logit_difference"],
        token: "int | str | Sequence[int | str]",
        *,
        position: int = -1,
    ) -> "Attribution":
        """Divide a logit, or the difference of two, among the components of the model (direct logit attribution).

        The scale of the final norm is held fixed. The contributions of an example add up to its logit, before a soft
        cap if the model has one.

        Args:
            metric: ``logit`` of `token`, or ``logit_difference`` of the two in `token`.
            token: A token id, or a text that is one token; for ``logit_difference`` a pair of them.
            position: Position in each example whose logits are meant; negative ones count from its end.

        Returns:
            A table, and a plot: ``run.attribution("logit", " Paris").plot()``.

        Raises:
            PlanError: The LM head is not known or is not linear, a position or token does not exist, or a text is not
                one token.
        """
        attribute_logit = load("pipelines.runs.attribution:attribute_logit", "run.attribution")
        tokens = [token] if isinstance(token, int | str) else list(token)
        wanted = {"logit": 1, "logit_difference": 2}.get(metric)
        if wanted != len(tokens):
            raise PlanError(
                f"attribution of {metric!r} to {token!r} was asked for: give 'logit' and one token, or "
                "'logit_difference' and two"
            )
        ids = [self._texts.token(one) for one in tokens]
        view: Attribution = attribute_logit(self, self._lm_head(), ids, position, self._texts.labels(ids))
        return view

    def pattern_plot(self, layer: int, head: int, *, example: int = 0, ax: "Axes | None" = None) -> "Axes":
        """Draw the attention pattern of one head: rows are query tokens, columns key tokens.

        Args:
            layer: Number of the block.
            head: Number of the head.
            example: Place of the example in the run.
            ax: Axes to draw into; a new figure unless given.

        Raises:
            UnknownSiteError: The model has no patterns there.
            PlanError: There is no such head or example.
        """
        draw_cells = load("analysis.support.plots:draw_cells", "run.pattern_plot")
        notebook_axes = load("analysis.support.plots:notebook_axes", "run.pattern_plot")
        patterns = self[f"pattern.{layer}"]
        if not 0 <= example < len(patterns):
            raise PlanError(f"there is no example {example}: the run has {len(patterns)}, counted from 0")
        if not 0 <= head < patterns[example].shape[1]:
            raise PlanError(f"there is no head {head}: block {layer} has {patterns[example].shape[1]}, counted from 0")
        pattern = patterns[example][:, head].detach().float().cpu().numpy()
        labels = self._texts.labels(self.tokens[example])
        size = min(14.0, 2.5 + 0.25 * len(labels))
        axes: Axes = notebook_axes(ax, size + 1.2, size)
        draw_cells(axes, pattern, value_name="attention", x_ticks=labels, y_ticks=labels)
        axes.set_title(f"attention of head {head} in block {layer}")
        axes.set_xlabel("key")
        axes.set_ylabel("query")
        return axes

    def _lm_head(self) -> "LMHead":
        from residua.analysis.lens.lm_head import LMHead

        if self._head is None:
            with self._running():
                self._head = LMHead(*lm_head_of(self._replayer.core))
        return self._head
