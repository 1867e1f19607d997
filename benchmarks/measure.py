"""Timing for the benchmarks: cases take turns, and ratios are taken within a round.

A shared or throttled machine changes its speed from minute to minute, but slows two cases of the same round alike. So
every figure is a median over the rounds, with the least and the greatest.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One run of one case.

    Attributes:
        wall: Seconds on the clock.
        cpu: Seconds of processor time, of all threads, in user code and in the kernel.
    """

    wall: float
    cpu: float


Timings = dict[str, list[Timing]]


def in_turns(
    cases: Mapping[str, Callable[[int], object]], *, rounds: int, prepare: Callable[[], object] | None = None
) -> Timings:
    """Run every case once in each round.

    Args:
        cases: Functions to run, by name; each gets the number of the round.
        rounds: Number of rounds.
        prepare: Called before each run, and not timed.
    """
    timings: Timings = {name: [] for name in cases}
    for number in range(rounds):
        for name, case in cases.items():
            if prepare is not None:
                prepare()
            wall, cpu = time.perf_counter(), time.process_time()
            case(number)
            timings[name].append(Timing(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu))
    return timings


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the median with least and greatest, for example ``1.02 (0.97 to 1.08)``."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def speedups(base: Sequence[Timing], case: Sequence[Timing], *, clock: str) -> list[float]:
    """Return the speed of `case` in every round as a multiple of `base`, by the `clock` ``wall`` or ``cpu``."""
    return [getattr(one, clock) / getattr(other, clock) for one, other in zip(base, case, strict=True)]


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])


def machine(*packages: str) -> str:
    """Return one line that describes the machine and the versions of `packages`."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    packaged = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"{os.cpu_count()} cores of {processor}, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {packaged}."
    )


def parser(description: str, *, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--out", type=Path, help="also write the table to this file")
    made.add_argument("--folder", type=Path, default=None, help="where to write; by default a temporary folder")
    made.add_argument("--rounds", type=int, default=rounds, help="rounds; every case runs once a round")
    return made


def publish(text: str, out: Path | None) -> None:
    """Print the report, and write it to `out` if that is given."""
    print(text)
    if out is not None:
        out.write_text(text + "\n")
