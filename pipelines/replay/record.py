"""What a folder of results says of itself in ``residua.json``: what was asked for, and under which conditions."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from residua.capture.identity.provenance import environment
from residua.store.base.canonical import differing
from residua.store.base.errors import PlanError
from residua.store.storage.files import sweep, write_file

RECORD = "residua.json"


def begin_or_go_on(folder: Path, request: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Write the record of a request, or compare it with the one that is there; returns whether one was.

    Args:
        folder: Where results go.
        request: What was asked for, as JSON values: an earlier run goes on only if it is the same.
        facts: What else is to be known; kept as the first run had it.

    Raises:
        PlanError: The folder holds the results of another request, or no results of ours.
    """
    path = folder / RECORD
    if path.exists():
        check_request(folder, request)
        sweep(folder)
        return True
    if folder.exists() and any(folder.iterdir()):
        raise PlanError(f"{folder} is not empty and has no {RECORD}: choose another folder for the results")
    record = {"request": request, **facts, "conditions": environment()}
    write_file(path, [json.dumps(record, indent=2, ensure_ascii=False).encode()])
    return False


def check_request(folder: Path, request: Mapping[str, Any]) -> None:
    """Compare a request with the one that a folder holds the results of.

    Raises:
        PlanError: They differ; the message says in what.
    """
    path = folder / RECORD
    request = json.loads(json.dumps(request))
    try:
        before = json.loads(path.read_text())["request"]
        lines = differing(before, request, word="now")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{path} is no record of a replay: choose another folder for the results") from error
    if before != request:
        listed = "\n  ".join(lines)
        raise PlanError(f"{path.parent} holds the results of another request:\n  {listed}\nChoose another --out.")
