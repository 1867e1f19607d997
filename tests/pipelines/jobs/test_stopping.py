"""Stopping in time: in order if the main thread can, by force if it hangs; handlers are restored afterwards."""

import signal
import subprocess
import sys
import time

import pytest

from residua.pipelines.jobs.stopping import STOPPED, stopping_in_time

HANG = """
import threading, time
from residua.pipelines.jobs.stopping import stopping_in_time
with stopping_in_time(grace_seconds=0.5):
    try:
        print("ready", flush=True)
        time.sleep(600)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        {then}
print("after", flush=True)
"""


def end(then: str, number: int) -> tuple[int, str, float]:
    words = [sys.executable, "-c", HANG.format(then=then)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        started = time.monotonic()
        said = process.stdout.read()
        return process.wait(timeout=60), said, time.monotonic() - started


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_interrupts_and_work_may_end_in_time(number: int) -> None:
    assert end("time.sleep(0.1)", number)[:2] == (0, "interrupted\nafter\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_hangs_ends_after_the_grace_period(number: int) -> None:
    code, said, seconds = end("threading.Event().wait()", number)
    assert (code, said) == (STOPPED, "interrupted\n")
    assert seconds < 30


SWALLOWED = """
import time
from residua.pipelines.jobs.stopping import stopping_in_time
try:
    with stopping_in_time(grace_seconds=60):
        try:
            print("ready", flush=True)
            time.sleep(600)
        except:
            pass
        try:
            time.sleep(600)
        except BaseException as error:
            raise ValueError("in order") from error
        finally:
            time.sleep(1.5)
            print("in order", flush=True)
except ValueError:
    print("after", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_that_a_library_swallows_is_raised_again_and_the_stop_itself_is_not_interrupted(
    number: int,
) -> None:
    with subprocess.Popen([sys.executable, "-c", SWALLOWED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        said, _ = process.communicate(timeout=120)
        assert (said, process.returncode) == ("in order\nafter\n", 0)


DEADLOCK = """
import ctypes, threading
from residua.pipelines.jobs.stopping import stopping_in_time
with stopping_in_time(grace_seconds=0.5):
    libc = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    threading.Timer(1.0, print, ["ready"], {"flush": True}).start()
    libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_main_thread_that_hangs_in_a_library_is_ended_too(number: int) -> None:
    """Python's handler never runs there; the watching thread still gets the signal."""
    with subprocess.Popen([sys.executable, "-c", DEADLOCK], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(timeout=120) == STOPPED


def test_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stopping_in_time():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert signal.set_wakeup_fd(-1) == -1
