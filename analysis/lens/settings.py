"""How a tuned lens is trained: every choice, with its default and the reason for it."""

from dataclasses import asdict, dataclass, field
from typing import Any

from residua.store.base.errors import AnalysisError


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class LensSettings:
    """How a tuned lens is trained. Each field is a flag of `residua lens train`."""

    rows: int | None = _setting(None, "train on about this many rows, chunks from everywhere (default: all)")
    skip_positions: int = _setting(1, "leave out this many first positions of an example; attention sinks sit there")
    held_out: float = _setting(0.1, "share of the examples that only judge the lens")
    held_out_rows: int = _setting(65_536, "most rows of them that are looked at")
    refine: bool = _setting(True, "refine the ridge solution by the KL divergence; without it, far cheaper and worse")
    epochs: int = _setting(1, "how often the refinement sees each row")
    batch_rows: int = _setting(128, "rows in one step")
    learning_rate: float = _setting(6e-3, "of Adam, in whitened coordinates; falls to zero along a cosine")
    candidates: int | None = _setting(None, "train on twice this many tokens of a large vocabulary (default: all)")
    together: int = _setting(8, "layers that one task refines in lockstep; they share the model's own distribution")
    parts: int | None = _setting(
        None,
        "split the rows, and average the lenses (default: as workers are left when each layer has one, and never into "
        "less than 100,000 rows each)",
    )
    seed: int = _setting(0, "seed of the choice and the order of rows, and of the split")

    def __post_init__(self) -> None:
        least = {
            "rows": 1,
            "held_out_rows": 1,
            "epochs": 1,
            "batch_rows": 1,
            "candidates": 1,
            "together": 1,
            "parts": 1,
        }
        for name, bound in {**least, "skip_positions": 0, "seed": 0}.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise AnalysisError(f"--{name.replace('_', '-')} is {value}: it must be at least {bound}")
        if not 0 < self.learning_rate < 1 or not 0 < self.held_out < 1:
            raise AnalysisError(
                f"--learning-rate {self.learning_rate} and --held-out {self.held_out}: both must lie between 0 and 1"
            )

    def to_json(self) -> dict[str, Any]:
        """Return what a folder of results records of them."""
        return asdict(self)
