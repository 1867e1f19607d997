"""What the sweep found out about one type: what is offered, what was proved, what is wrong, and the reasons."""

import re
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, ParamSpec, TypeVar

from residua.store.base.errors import ResiduaError

ATTENTION = ("q", "k", "v", "pattern", "z")
PARTS = ("attn_out", "mlp_out")

_P = ParamSpec("_P")
_R = TypeVar("_R")
_LAYER = re.compile(r"(?P<kind>.+)\.(?P<layer>[0-9]+)")


@dataclass(kw_only=True)
class Record:
    """The findings of one type.

    Attributes:
        registry: Where the type is listed.
        key: The type, and its variant.
        class_name: The class of the model.
        n_blocks: Number of its blocks.
        runs: Whether the model itself was built and runs on the inputs of the sweep.
        offered: From kind to the blocks that have it; a kind that a model has once has [0].
        proved: From kind to the blocks for which an independent check holds.
        by: From kind to what proved it.
        wrong: Sentences about what contradicts the truth.
        crashed: Sentences about errors that are not Residua's own.
        refused: From what was tried to Residua's own error.
        refusal: What Residua says of all that is lacking.
        notes: Notes of the captures.
        replay_notes: Notes of the replay.
        remarks: What else is worth knowing.
        n_modules: How many ``module:`` sites were compared.
        not_run: Why the model was not built or does not run.
        seconds: CPU time.
    """

    registry: str
    key: str
    class_name: str = ""
    n_blocks: int = 0
    runs: bool = False
    offered: dict[str, list[int]] = field(default_factory=dict)
    proved: dict[str, list[int]] = field(default_factory=dict)
    by: dict[str, list[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    crashed: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    refusal: str = ""
    notes: list[str] = field(default_factory=list)
    replay_notes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    n_modules: int = 0
    not_run: str = ""
    seconds: float = 0.0

    def offer(self, sites: Iterable[str]) -> None:
        """Note which sites there are."""
        for name in sites:
            match = _LAYER.fullmatch(name)
            kind, layer = (match["kind"], int(match["layer"])) if match else (name, 0)
            self.offered.setdefault(kind, []).append(layer)

    def judge(self, kind: str, layer: int | None, good: bool, text: str, how: str) -> None:
        """Note the result of a check of one site, or of a whole kind."""
        if not good:
            self.wrong.append(f"{kind if layer is None else f'{kind}.{layer}'}: {text}")
            return
        layers = self.proved.setdefault(kind, [])
        if (layer or 0) not in layers:
            layers.append(layer or 0)
        ways = self.by.setdefault(kind, [])
        if how and how not in ways:
            ways.append(how)

    def note_wrong(self, kind: str, text: str) -> None:
        """Note what contradicts the truth."""
        self.wrong.append(f"{kind}: {text}")

    def remark(self, text: str) -> None:
        """Note what is worth knowing and not wrong."""
        self.remarks.append(text)

    def note_replay(self, notes: Iterable[str]) -> None:
        """Keep the notes of a replay."""
        self.replay_notes = list(notes)

    def count_modules(self, n: int) -> None:
        """Note that so many more ``module:`` sites were compared."""
        self.n_modules += n

    def attempt(self, what: str, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R | None:
        """Run a check; Residua's own errors are refusals, all others are crashes."""
        try:
            return function(*args, **kwargs)
        except ResiduaError as error:
            self.refused[what] = f"{type(error).__name__}: {error}"
        except Exception as error:  # noqa: BLE001 - a crash of one type is a result of the sweep
            self.crashed.append(f"{what}: {described(error)}")
        return None

    @property
    def state(self) -> str:
        """Return: not run, crashed, wrong, refused, modules only, logits only or right."""
        if not self.runs:
            return "not run"
        if self.crashed:
            return "crashed"
        if self.wrong:
            return "wrong"
        if not any(kind.rpartition(".")[2] in ("resid_post", *ATTENTION, *PARTS) for kind in self.offered):
            if "module" in self.proved and not self.refused:
                return "modules only"
            return "refused" if "logits" not in self.offered or self.refused else "logits only"
        return "refused" if any(not what.startswith("replacement") for what in self.refused) else "right"

    def has(self, kind: str) -> bool:
        """Return whether every offered site of a kind is proved, in every stack, and there is one."""
        offered = {name: layers for name, layers in self.offered.items() if name.rpartition(".")[2] == kind}
        return bool(offered) and all(set(layers) <= set(self.proved.get(name, [])) for name, layers in offered.items())

    @property
    def stacks(self) -> list[str]:
        """The stacks of blocks that the model has, as sites name them: empty text if there is one only."""
        found = [name.rpartition(".")[0] for name in self.offered if name.rpartition(".")[2] == "resid_post"]
        pair = ["encoder", "decoder"]
        return pair if set(found) & set(pair) else found or [""]

    def as_json(self) -> dict[str, Any]:
        """Return the fields, and the state."""
        return {**asdict(self), "state": self.state}


class StackRecord:
    """Notes the findings about one stack of a model under its name."""

    def __init__(self, record: Record, stack: str, n_blocks: int) -> None:
        self.n_blocks = n_blocks
        self._record = record
        self._stack = stack

    def judge(self, kind: str, layer: int | None, good: bool, text: str, how: str) -> None:
        """As `Record.judge`."""
        self._record.judge(f"{self._stack}.{kind}", layer, good, text, how)

    def note_wrong(self, kind: str, text: str) -> None:
        """As `Record.note_wrong`."""
        self._record.note_wrong(f"{self._stack}.{kind}", text)

    def remark(self, text: str) -> None:
        """As `Record.remark`."""
        self._record.remark(text)

    def note_replay(self, notes: Iterable[str]) -> None:
        """As `Record.note_replay`."""
        self._record.note_replay(notes)

    def count_modules(self, n: int) -> None:
        """As `Record.count_modules`."""
        self._record.count_modules(n)

    def attempt(self, what: str, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R | None:
        """As `Record.attempt`."""
        return self._record.attempt(f"{what} in {self._stack}", function, *args, **kwargs)


def from_json(fields: dict[str, Any]) -> Record:
    """Return the findings that `Record.as_json` gave."""
    return Record(**{name: value for name, value in fields.items() if name != "state"})


def described(error: BaseException) -> str:
    """Return an error with its place in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/site-packages/" not in f.filename and "/tests/" not in f.filename]
    places = " and ".join(f"{f.filename.rsplit('/', 2)[-2:]}:{f.lineno}" for f in (frames[-1:] + ours[-1:]))
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} at {places}"
