"""The settings of sweeps and of repeated sequences, apart, so that the command line can list them without torch."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict

from residua.pipelines.setup.capture_settings import DEVICE_HELP, PP_HELP, SITES_HELP, TP_HELP
from residua.store.base.errors import PlanError
from residua.store.base.naming import named, setting

if TYPE_CHECKING:
    from residua.capture.patching.pair import Pair


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """The grid of a sweep, and where the model runs. Each field is a flag of `residua patch` and `residua attribute`.

    Raises:
        PlanError: `positions` is another word than ``together``.
    """

    sites: str | Collection[str] = setting("resid_post.*", SITES_HELP)
    positions: Sequence[int] | Literal["together"] | None = setting(
        None,
        "positions to patch, such as 0-9,-1 (negative ones count from the end), or 'together' for all at once "
        "(default: each position by itself)",
    )
    heads: bool = setting(False, "patch each head by itself, at the sites z, q, k and v")
    metric: str = setting(
        "logit_difference",
        "what is measured after the last position: logit_difference (answer minus wrong), loss (of the answer), "
        "probability (of the answer) or kl (from the clean run)",
    )
    device: str = setting("auto", DEVICE_HELP)
    tp: int = setting(1, TP_HELP)
    pp: int = setting(1, PP_HELP)

    def __post_init__(self) -> None:
        if isinstance(self.positions, str) and self.positions != "together":
            raise PlanError(f"positions is {self.positions!r}: give numbers, or together for all of them at once")

    def positions_of(self, pair: "Pair", number: int) -> Sequence[int | None]:
        """Return the positions of one pair; None stands for all of them together.

        Raises:
            PlanError: The pair has no such position.
        """
        length = len(pair.clean)
        if isinstance(self.positions, str):
            return [None]
        if self.positions is None:
            return list(range(length))
        wrong = [position for position in self.positions if not -length <= position < length]
        if wrong or not self.positions:
            raise PlanError(
                f"pair {number} has {length} tokens: there is no position {wrong[0] if wrong else 'chosen'}"
            )
        return sorted({position % length for position in self.positions})


class SweepOptions(TypedDict, total=False):
    """The fields of `SweepSettings`, as named arguments of `residua.patch` and `residua.attribute`."""

    sites: str | Collection[str]
    positions: Sequence[int] | Literal["together"] | None
    heads: bool
    metric: str
    device: str
    tp: int
    pp: int


@dataclass(frozen=True, kw_only=True)
class RepeatSettings:
    """How to make sequences of repeated random tokens. Each field is a flag of `residua induction`.

    Raises:
        PlanError: A number is too small.
    """

    period: int = setting(50, "tokens of the block that is repeated")
    copies: int = setting(2, "copies of the block in a sequence")
    n_examples: int = setting(64, "number of sequences")
    bos: bool | None = setting(None, "put a BOS before each sequence (default: on if the model has a BOS)")
    seed: int = setting(0, "seed of the random tokens")

    def __post_init__(self) -> None:
        for name, least in (("period", 2), ("copies", 2), ("n_examples", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise PlanError(f"{named(name, getattr(self, name))}: it must be at least {least}")
