"""How much a model notices that stored rows are rounded: ``fidelity.json`` beside an archive's arrays.

`residua fidelity` measures it and writes the file; `store/FORMAT.md` describes it. It is optional, it is no part of
what names the archive, and nothing is read by it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from residua.store.base.canonical import digest_of
from residua.store.base.errors import DamagedArchiveError, PlanError
from residua.store.format.plan import Plan
from residua.store.storage.files import write_file
from residua.store.storage.small_files import read_small

FILE = "fidelity.json"
_MOST_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class SiteFidelity:
    """What becomes of the model's output if the stored rows of one site take the place of the computed ones.

    Attributes:
        kl_mean: Mean over tokens of KL(as computed || with stored rows), in nats.
        kl_max: The largest of them.
        top1_agreement: Share of tokens whose likeliest next token stays the same.
    """

    kl_mean: float
    kl_max: float
    top1_agreement: float


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """What was measured of an archive.

    Attributes:
        sites: By name of the site.
        n_examples: Examples that ran.
        n_tokens: Their tokens.
    """

    sites: Mapping[str, SiteFidelity]
    n_examples: int
    n_tokens: int


def write_fidelity(archive: Path, plan: Plan, found: Fidelity) -> None:
    """Write `fidelity.json` of an archive, durably; an earlier one is replaced."""
    entry = {"plan": plan.digest, **asdict(found)}
    content = {"fidelity": entry, "sha256": digest_of(entry)}
    write_file(archive / FILE, [json.dumps(content, indent=2).encode()])


def read_fidelity(archive: Path, plan: Plan) -> Fidelity | None:
    """Return what was measured of an archive; None if nothing was.

    Raises:
        DamagedArchiveError: The file is not what was written.
        PlanError: It was measured of another archive.
    """
    path = archive / FILE
    if not path.exists():
        return None
    text = read_small(archive, path, _MOST_BYTES)
    try:
        content = json.loads(text)
        entry = content["fidelity"]
        if content["sha256"] != digest_of(entry):
            raise ValueError("its SHA-256 differs")
        sites = {str(name): _site(values) for name, values in entry["sites"].items()}
        found = Fidelity(sites=sites, n_examples=int(entry["n_examples"]), n_tokens=int(entry["n_tokens"]))
        of = entry["plan"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedArchiveError(f"{path} cannot be read ({error}): measure again with residua fidelity") from error
    if of != plan.digest:
        raise PlanError(f"{path} was measured of another archive: remove it, or run residua fidelity again")
    return found


def _site(values: Mapping[str, object]) -> SiteFidelity:
    names = [entry.name for entry in fields(SiteFidelity)]
    numbers = [values[name] for name in names]
    if not all(isinstance(number, float | int) and math.isfinite(number) for number in numbers):
        raise ValueError("it holds something that is no number")
    return SiteFidelity(**{name: float(str(number)) for name, number in zip(names, numbers, strict=True)})
