"""Replicas that generate together write the archive of one process, byte for byte, also if one of them is killed."""

import json
import time
from pathlib import Path

import pytest

from tests.forking import SOON, ForkedWorkers, Start, launched
from tests.ragged import MODEL
from tests.stopped import check_end, content

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
LIMIT = 600  # seconds of one launch, on a busy machine


def words(dataset: Path, out: Path, *more: str) -> list[str]:
    out.parent.mkdir()
    job = ["capture", "--model", str(MODEL), "--dataset", str(dataset), "--out", str(out), "--sites", "resid_post.3"]
    return [*job, "--generate", "6", "--temperature", "1", "--batch-tokens", "32", "--rows-per-shard", "32", *more]


def test_replicas_share_the_generation(forked_workers: ForkedWorkers, tmp_path: Path) -> None:
    dataset = tmp_path / "prompts.jsonl"
    texts = [" ".join(["the list"] * (1 + i % 5)) for i in range(24)]
    dataset.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    one, two, three, joined = (tmp_path / name / "a.zarr" for name in ("one", "two", "three", "joined"))
    [ended] = forked_workers.run([Start(words=words(dataset, one), env={})], LIMIT)
    assert ended.code == 0, ended.output
    both = forked_workers.run(launched(words(dataset, two), 2, slow=0.005), LIMIT)
    assert [end.code for end in both] == [0, 0], both
    check_end(two, one)

    forked_workers.start(launched(words(dataset, three), 2, slow=0.02))
    spool = three.with_name(".a.zarr.generated") / "continuations"
    while not list(spool.glob("*.json")):
        time.sleep(0.02)
    forked_workers.kill(1)
    ends = forked_workers.wait(SOON)
    assert ends[0].code == 0, ends[0].output
    assert content(three) == content(one)

    command = words(dataset, joined, "--join")
    begun = joined.with_name(".a.zarr.generated") / "continuations" / "0.json"
    late = Start(words=command, env={}, slow=0.02, after=str(begun))
    ends = forked_workers.run([Start(words=command, env={}, slow=0.02), late], LIMIT)
    assert [end.code for end in ends] == [0, 0], ends
    check_end(joined, one)
