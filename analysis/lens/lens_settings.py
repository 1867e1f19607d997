"""The settings of training a lens, apart from the training, so that the command line can list them without torch."""

from dataclasses import dataclass
from typing import TypedDict

from residua.store.base.errors import AnalysisError
from residua.store.base.naming import named, setting

GROUP_HELP = (
    "column whose equal values are held out together, besides documents and equal contents (source_index: documents "
    "alone; example: each example for itself; default: none)"
)
_CANDIDATES = 8_192  # of either kind


@dataclass(frozen=True, kw_only=True)
class LensSettings:
    """How a tuned lens is trained. Each field is a flag of `residua lens train`."""

    rows: int | None = setting(None, "train on about this many rows, drawn from the full archive (default: all)")
    skip_positions: int = setting(1, "skip this many first positions of each example, where attention sinks are")
    held_out: float = setting(0.1, "share of the documents to hold out for the evaluation")
    group: str | None = setting(
        None,
        GROUP_HELP,
    )
    held_out_rows: int = setting(65_536, "evaluate on at most this many held-out rows")
    refine: bool = setting(
        True, "refine the ridge solution on the KL divergence; without it, training is cheaper but less accurate"
    )
    epochs: int = setting(1, "number of times that the refinement uses each row")
    batch_rows: int = setting(128, "rows in one step of the refinement")
    learning_rate: float = setting(6e-3, "learning rate of Adam, in whitened coordinates; decays to 0 along a cosine")
    candidates: int | None = setting(
        None,
        "refine on twice this many tokens of the vocabulary in each step; 0: on all (default: 8,192 of a vocabulary of "
        "65,536 or more, else all)",
    )
    together: int = setting(8, "layers that one job refines in lockstep; they share the model's own distribution")
    parts: int | None = setting(
        None,
        "divide the rows into this many parts, train a lens on each, and average the lenses (default: as many parts as "
        "there are workers per layer, with at least 100,000 rows each)",
    )
    device: str | None = setting(
        None, "device of each worker for sums, refinement and evaluation, for example cuda (default: the processor)"
    )
    seed: int = setting(0, "seed for the choice and order of rows, and for the held-out examples")

    def __post_init__(self) -> None:
        at_least_1 = ("rows", "held_out_rows", "epochs", "batch_rows", "together", "parts")
        for name, least in {**dict.fromkeys(at_least_1, 1), "skip_positions": 0, "candidates": 0, "seed": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise AnalysisError(f"{named(name, value)}: it must be at least {least}")
        if not 0 < self.learning_rate < 1 or not 0 < self.held_out < 1:
            raise AnalysisError(
                f"{named('learning_rate', self.learning_rate)} and {named('held_out', self.held_out)}: both must lie "
                "between 0 and 1"
            )

    def n_candidates(self, n_tokens: int) -> int:
        """Return how many of `n_tokens` tokens are candidates of either kind; 0: all are used."""
        if self.candidates is None:
            return _CANDIDATES if n_tokens >= 8 * _CANDIDATES else 0
        return self.candidates if 2 * self.candidates < n_tokens else 0


class LensOptions(TypedDict, total=False):
    """The fields of `LensSettings`, as named arguments of `TunedLens.fit`."""

    rows: int | None
    skip_positions: int
    held_out: float
    group: str | None
    held_out_rows: int
    refine: bool
    epochs: int
    batch_rows: int
    learning_rate: float
    candidates: int | None
    together: int
    parts: int | None
    device: str | None
    seed: int
