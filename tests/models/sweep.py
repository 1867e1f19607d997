"""Sweep over every model type of transformers: build it tiny, capture it, and hold the rows against the model itself.

    python -m tests.models.sweep                         # all registries; writes docs/models-table.md
    python -m tests.models.sweep --types bloom,falcon    # these only; writes their lines of the page
    python -m tests.models.sweep --check                 # compares with the page, and writes nothing

Each type is checked in a process of its own with a time limit, so a crash is a result and not an end. Results are JSON
lines, one a type; a sweep that was stopped goes on where it was.
"""

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers import PreTrainedModel

from tests.models import table
from tests.models.checks.calls import check_calls, has_own_call
from tests.models.checks.images import check_images, check_tower, needs_images, takes_only_images
from tests.models.checks.language import check_language_model
from tests.models.checks.pairs import check_pairs
from tests.models.findings import Record, described, from_json
from tests.models.registries import NOT_RUN, REGISTRIES, build, keys_of

TIME_LIMIT = 600.0  # seconds of the wall; the slowest type takes some fifteen on an idle core
PAGE = Path(__file__).parent.parent.parent / "docs" / "models-table.md"
RESULTS = Path("build") / "models.jsonl"
_INHERITED = ("pandas", "datasets", "residua.pipelines.capture.encoder_decoder", "residua.pipelines.capture.images")
"""Modules that captures import late; processes that are forked from this one have them then."""
_OVER_TOKENS = ("causal", "masked", "vision-language")


def examine(registry: str, key: str) -> Record:
    """Build one type and check it, in this process."""
    record = Record(registry=registry, key=key, not_run=NOT_RUN.get(key, ""))
    if record.not_run:
        return record
    begin = time.process_time()
    try:
        model = build(registry, key)
        record.class_name = type(model).__name__
        check = check_calls if has_own_call(key) else check_of(registry, model)
        check(model, record)
        if registry == "vision-language" and model.main_input_name == "input_ids":
            record.attempt("vision tower", check_tower, model, record)
    except Exception as error:  # noqa: BLE001 - a type that cannot be built or run is a result of the sweep
        if record.runs:
            record.crashed.append(described(error))
        else:
            record.not_run = described(error)
    record.seconds = round(time.process_time() - begin, 1)
    return record


def check_of(registry: str, model: PreTrainedModel) -> Callable[[PreTrainedModel, Record], None]:
    """Return what checks a model: by what it takes."""
    if model.config.is_encoder_decoder:
        return check_pairs if model.main_input_name == "input_ids" else check_calls
    if (registry in _OVER_TOKENS or model.main_input_name == "input_ids") and not needs_images(model):
        return check_language_model
    return check_images if takes_only_images(model) else check_calls


def _examine_apart(registry: str, key: str, end: Connection) -> None:
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - a device
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
        end.send(examine(registry, key).as_json())
        end.close()
        os._exit(0)


def examined_apart(registry: str, key: str) -> Record:
    """Check one type in a process of its own; if it dies or hangs, the record says so."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_examine_apart, args=(registry, key, theirs))
    process.start()
    theirs.close()
    record = Record(registry=registry, key=key, runs=True)
    try:
        if ours.poll(TIME_LIMIT):
            record = from_json(ours.recv())
        else:
            record.crashed.append(f"hung for {TIME_LIMIT:.0f} s")
    except EOFError:
        process.join()
        record.crashed.append(f"the process died with exit code {process.exitcode}")
    finally:
        if process.is_alive() and record.crashed:
            process.kill()
        process.join()
    return record


def known(results: Path) -> dict[tuple[str, str], Record]:
    """Return the records of earlier sweeps, by registry and key; of several, the last."""
    if not results.exists():
        return {}
    records = [from_json(json.loads(line)) for line in results.read_text().splitlines() if line.strip()]
    return {(record.registry, record.key): record for record in records}


def sweep(chosen: Sequence[tuple[str, str]], results: Path, n_jobs: int) -> None:
    """Check types, and append each record to the results as it comes."""
    for name in _INHERITED:
        import_module(name)
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file, ThreadPoolExecutor(n_jobs) as pool:
        for record in pool.map(lambda pair: examined_apart(*pair), chosen):
            file.write(json.dumps(record.as_json()) + "\n")
            file.flush()
            print(summary(record), flush=True)


def summary(record: Record) -> str:
    """Return one line about a type."""
    shown = [kind for kind in table.SHOWN if any(name.rpartition(".")[2] == kind for name in record.offered)]
    proved = " ".join(kind if record.has(kind) else f"({kind})" for kind in shown)
    trouble = "; ".join([*record.crashed, *record.wrong, *(f"{k}: {v}" for k, v in record.refused.items())])
    what = record.not_run or trouble
    return f"{record.key:28s} {record.state:12s} {record.seconds:5.1f} s  {proved}  {what[:300]}"


def main(words: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", default=",".join(REGISTRIES), help=f"registries, of {', '.join(REGISTRIES)}")
    parser.add_argument("--types", default="", help="types, separated by commas; all if empty")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON lines, one a type")
    parser.add_argument("--again", action="store_true", help="check types again that the results have")
    parser.add_argument("--check", action="store_true", help="compare with the page instead of writing it")
    options = parser.parse_args(words)
    types = [name for name in options.types.split(",") if name]
    chosen = [
        (registry, key)
        for registry in options.registry.split(",")
        for key in keys_of(registry)
        if not types or key in types or key.partition(":")[0] in types
    ]
    before = {} if options.again or types else known(options.results)
    sweep([pair for pair in chosen if pair not in before], options.results, options.jobs)
    after = known(options.results)
    found = {pair: after[pair] for pair in chosen if pair in after}
    print(counts(list(found.values())))
    if types and not PAGE.exists():
        return 0
    page = table.renewed(PAGE.read_text(), found.values()) if types else table.page(found.values())
    if options.check:
        return _compare(page)
    PAGE.write_text(page)
    return 0


def counts(records: Sequence[Record]) -> str:
    """Return how many types there are of each state and with each proof."""
    lines = []
    for registry in dict.fromkeys(record.registry for record in records):
        of_it = [record for record in records if record.registry == registry]
        states = ", ".join(f"{n} {state}" for state, n in Counter(record.state for record in of_it).most_common())
        lines.append(f"{registry}: {len(of_it)} types; {states}")
        lines.append("  " + "; ".join(f"{name} {n}" for name, n in table.totals(of_it).items()))
    return "\n".join(lines)


def _compare(page: str) -> int:
    committed = PAGE.read_text() if PAGE.exists() else ""
    if committed == page:
        return 0
    ours, theirs = set(committed.splitlines()), set(page.splitlines())
    for line in [*(f"- {line}" for line in ours - theirs), *(f"+ {line}" for line in theirs - ours)]:
        print(line)
    return 1


def quiet() -> None:
    """Leave out what libraries say of tiny models, and use one thread a process."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


if __name__ == "__main__":
    quiet()
    sys.exit(main())
