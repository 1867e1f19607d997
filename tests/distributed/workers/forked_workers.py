"""Workers in real processes that start fast: one process imports everything and forks them.

The workers find each other as under torchrun, by `RANK`, `WORLD_SIZE` and an address. No worker is reaped before all
have ended, so a signal never goes to a process number that another process has by then.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.pipelines import forking

SECONDS = 300
COMMAND = "residua"
LOST_SECONDS = 5.0
"""Time without a heartbeat after which these workers count as lost; by default it is 30."""
SOON = 150.0
"""Time within which the others have ended after one is killed or all are told to stop.

It is long enough for a busy machine, and far below the ten minutes after which a collective gives up.
"""


@dataclass(frozen=True, kw_only=True)
class Start:
    """How one worker starts.

    Attributes:
        words: Its command line.
        env: Its environment variables.
        module: What takes the command line: this command, or the module of a program that runs as with ``python -m``.
        slow: Time by which each call of a model takes longer, in seconds.
        after: A file that has to exist before it begins.
    """

    words: Sequence[str]
    env: dict[str, str]
    module: str = COMMAND
    slow: float = 0
    after: str = ""


@dataclass(frozen=True)
class Ended:
    """How a worker ended: its exit code (negative: the signal that ended it), and its output."""

    code: int
    output: str


def launched(words: Sequence[str], n: int, *, slow: float = 0, module: str = COMMAND) -> list[Start]:
    """Return `n` workers that are launched together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(n), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [Start(words=words, env={**common, "RANK": str(rank)}, slow=slow, module=module) for rank in range(n)]


class ForkedWorkers:
    """The process that forks.

    Args:
        folder: Where the workers' output goes.

    Attributes:
        pids: Process numbers of the workers that were started last.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._n = 0
        self.pids: list[int] = []
        self._logs: list[Path] = []
        self._server = subprocess.Popen(
            [sys.executable, "-c", "from tests.distributed.workers.forked_workers import serve; serve()"],
            cwd=forking.ROOT,
            env={**forking.ENVIRONMENT, "PYTHONPATH": str(forking.ROOT), "DS_ACCELERATOR": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._answer() == "ready"

    def start(self, workers: Sequence[Start]) -> None:
        """Start `workers`; earlier workers must have ended."""
        self._logs = [self._folder / f"{self._n + i}.log" for i in range(len(workers))]
        self._n += len(workers)
        self._send(
            [{**asdict(worker), "log": str(log), "die_at": 0} for worker, log in zip(workers, self._logs, strict=True)]
        )
        self.pids = self._answer()

    def kill(self, worker: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to one worker, which may have ended."""
        os.kill(self.pids[worker], number)

    def wait(self, seconds: float = SECONDS) -> list[Ended]:
        """Return how the workers ended; after `seconds`, kill them and fail."""
        try:
            codes = self._answer(seconds)
        except AssertionError:
            for pid in self.pids:
                os.kill(pid, signal.SIGKILL)
            self._answer()
            self._send("reap them")
            raise
        self._send("reap them")
        return [Ended(code, log.read_text()) for code, log in zip(codes, self._logs, strict=True)]

    def run(self, workers: Sequence[Start], seconds: float = SECONDS) -> list[Ended]:
        """Run `workers` until they end."""
        self.start(workers)
        return self.wait(seconds)

    def close(self) -> None:
        """End the process."""
        self._server.communicate(timeout=SECONDS)

    def _send(self, message: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(message).encode() + b"\n")
        self._server.stdin.flush()

    def _answer(self, seconds: float = SECONDS) -> Any:
        assert self._server.stdout is not None
        ready = forking.is_readable(self._server.stdout, seconds)
        said = [log.read_text()[-2000:] for log in self._logs if log.exists()]
        assert ready, f"no answer for {seconds} seconds; the workers said:\n" + "\n".join(said)
        return json.loads(self._server.stdout.readline())


def serve() -> None:
    """Run the process that forks, until its standard input ends."""
    import datasets  # noqa: F401  # so that no worker has to import it
    import transformers.integrations.deepspeed  # noqa: F401  # likewise

    import residua.pipelines.capture.capture
    import residua.pipelines.circuits.induction
    import residua.pipelines.circuits.sweep
    import residua.pipelines.cli.progress
    import residua.pipelines.replay.replay  # noqa: F401  # as above
    import tests.distributed.model_parallel.capture_cases
    import tests.distributed.workers.user_script  # noqa: F401  # as above
    from residua.capture.scheduling.membership import Membership

    defaults = Membership.__init__.__kwdefaults__
    assert defaults is not None
    defaults["lost_seconds"] = LOST_SECONDS
    assert len(threading.enumerate()) == 1
    forking.share_memory()
    _say("ready")
    for line in iter(sys.stdin.readline, ""):
        pids = [_fork(request) for request in json.loads(line)]
        _say(pids)
        ends = [os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT) for pid in pids]
        _say([end.si_status if end.si_code == os.CLD_EXITED else -end.si_status for end in ends if end is not None])
        sys.stdin.readline()
        for pid in pids:
            os.waitpid(pid, 0)


def _fork(request: dict[str, Any]) -> int:
    from residua.pipelines.cli.main import main

    pid = os.fork()
    if pid:
        return pid
    forking._become(request)
    os.environ.update(request["env"])
    while request["after"] and not Path(request["after"]).exists():
        time.sleep(0.01)
    if request["module"] != COMMAND:
        _run_program(request["module"], request["words"])
    code = 70
    try:
        code = main(request["words"])
    except BaseException:  # noqa: BLE001  # a child must not continue as its parent
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run_program(module: str, words: Sequence[str]) -> NoReturn:
    """Run a user's own program, and end as Python does: an exception is printed, and threads are waited for."""
    rank, n_ranks = os.environ["RANK"], os.environ["WORLD_SIZE"]
    os.environ |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n_ranks, "CUDA_VISIBLE_DEVICES": ""}
    sys.argv[1:] = words
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit()


def _say(message: object) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()
