import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residua.store.storage.direct import LEAST_BYTES
from residua.store.storage.files import publish, sweep, write_file


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def refuse(code: int) -> Callable[..., int]:
    def call(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return call


@settings(deadline=None, max_examples=30)
@given(st.lists(st.binary(max_size=30), max_size=30), st.integers(1, 60))
def test_buffers_are_written_in_order_however_few_bytes_the_kernel_takes(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], most: int
) -> None:
    path = tmp_path_factory.mktemp("files") / "a"
    real = os.write

    def short(descriptor: int, buffer: memoryview) -> int:
        return real(descriptor, buffer[:most])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", short)
        written = write_file(path, [np.frombuffer(part, np.uint8) if len(part) % 2 else part for part in parts])
    assert path.read_bytes() == b"".join(parts)
    assert written == path.stat().st_size


def test_thousands_of_small_buffers(tmp_path: Path) -> None:
    parts = [bytes([i % 256]) * (i % 5) for i in range(5000)]
    write_file(tmp_path / "deep" / "down" / "a", parts)
    assert (tmp_path / "deep" / "down" / "a").read_bytes() == b"".join(parts)


def test_arrays_of_any_shape_and_type_are_written_as_their_bytes(tmp_path: Path) -> None:
    parts: list[npt.NDArray[np.generic]] = [
        np.arange(6, dtype=np.int64).reshape(2, 3),
        np.array(3, np.float16),
        np.zeros((0, 4)),
    ]
    write_file(tmp_path / "a", parts)
    assert (tmp_path / "a").read_bytes() == b"".join(part.tobytes() for part in parts)


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    write_file(tmp_path / "a", [b"a long first text"])
    write_file(tmp_path / "a", [b"short"])
    assert (tmp_path / "a").read_bytes() == b"short"
    assert contents(tmp_path) == {"a"}


def test_data_reaches_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def noted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            target = str(Path(f"/proc/self/fd/{args[0]}").readlink() if isinstance(args[0], int) else args[0])
            events.append(f"{name} {'temporary' if target.endswith('.tmp') else Path(target).name}")
            return real(*args, **kwargs)

        return call

    for name in ("write", "fdatasync", "fsync", "replace", "link"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    (tmp_path / "folder").mkdir()
    write_file(tmp_path / "folder" / "a", [b"x"])
    publish(tmp_path / "folder" / "b", b"x")
    before = ["write temporary", "fdatasync temporary"]
    assert events == [*before, "replace temporary", "fsync folder", *before, "link temporary", "fsync folder"]


def test_macos_flushes_the_cache_of_the_disk_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda descriptor, command: flushed.append(command))
    monkeypatch.delattr(os, "fdatasync")
    write_file(tmp_path / "a", [b"x"])
    assert flushed == [51]


def test_new_folders_are_durable_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    write_file(tmp_path / "c" / "0" / "a", [b"x"])
    assert synced == [tmp_path.name, "c", "0"]


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "disk is full: free some space"),
        (errno.EROFS, "read-only: choose another place"),
        (errno.EACCES, "permissions"),
        (errno.EINTR, "try again"),
    ],
)
@pytest.mark.parametrize("call", ["write", "fdatasync", "replace", "open"])
def test_error_names_the_file_and_what_to_do_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, advice: str, call: str
) -> None:
    monkeypatch.setattr(os, call, refuse(code))
    with pytest.raises(OSError, match=rf"cannot write .*/acts .*{advice}") as caught:
        write_file(tmp_path / "acts", [b"x" * 100])
    assert caught.value.errno == code
    assert contents(tmp_path) == set()


def test_a_kernel_that_stops_in_mid_file_leaves_nothing(tmp_path: Path) -> None:
    script = (
        "import resource, sys, numpy as np\n"
        "from pathlib import Path\n"
        "from residua.store.storage.files import write_file\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "write_file(Path(sys.argv[1]), [np.ones(60_000, np.uint8), np.ones(60_000, np.uint8)])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "a"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cannot write" in done.stderr
    assert "smaller shards" in done.stderr
    assert contents(tmp_path) == set()


def test_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(b"")
    with pytest.raises(OSError, match=r"c/0/a .*not a folder") as caught:
        write_file(tmp_path / "c" / "0" / "a", [b"x"])
    assert caught.value.errno == errno.ENOTDIR


def test_publishing_never_overwrites(tmp_path: Path) -> None:
    publish(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError, match="a exists already"):
        publish(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert contents(tmp_path) == {"a"}


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_file_system_without_hard_links_is_named_as_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "link", refuse(number))
    with pytest.raises(OSError, match=r"/a .*: this file system has no hard links, .*: choose another") as caught:
        publish(tmp_path / "a", b"x")
    assert caught.value.errno == number
    assert contents(tmp_path) == set()


def test_of_many_that_publish_one_name_exactly_one_succeeds(tmp_path: Path) -> None:
    won: list[int] = []
    start = threading.Barrier(8)

    def attempt(number: int) -> None:
        start.wait()
        try:
            publish(tmp_path / "a", f"{number}".encode() * 1000)
        except FileExistsError:
            return
        won.append(number)

    threads = [threading.Thread(target=attempt, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert (tmp_path / "a").read_bytes() == f"{won[0]}".encode() * 1000
    assert contents(tmp_path) == {"a"}


def test_sweep_removes_what_a_killed_writer_left_and_nothing_else(tmp_path: Path) -> None:
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from residua.store.storage.files import write_file\n"
        "def wait(_): print('writing', flush=True); time.sleep(600)\n"
        "os.fdatasync = wait\n"
        "write_file(Path(sys.argv[1]), [b'x' * 1000])\n"
    )
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".mine.tmp").write_bytes(b"not ours")
    (tmp_path / "kept").write_bytes(b"")
    writer = subprocess.Popen([sys.executable, "-c", script, tmp_path / "c" / "0"], stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None
        writer.stdout.readline()
        assert len(contents(tmp_path)) == 3
        assert sweep(tmp_path) == []
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    (removed,) = sweep(tmp_path)
    assert removed.name.startswith(f".0.{writer.pid}-")
    assert contents(tmp_path) == {"c/.mine.tmp", "kept"}


def test_sweep_removes_a_temporary_whose_number_now_belongs_to_this_process(tmp_path: Path) -> None:
    left = tmp_path / f".0.{os.getpid()}-0123abcd.tmp"
    left.write_bytes(b"x")
    assert sweep(tmp_path) == [left]


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.sampled_from([0, 1, 4, 511, 4096, 4 * 2**20 - 4, 4 * 2**20, 4 * 2**20 + 5]), min_size=1, max_size=5),
    st.sampled_from([None, 4096, 5000]),
)
def test_large_files_are_written_completely_past_the_page_cache(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], most: int | None
) -> None:
    path = tmp_path_factory.mktemp("files") / "a"
    data = np.random.default_rng(0).integers(0, 256, LEAST_BYTES + sum(sizes), dtype=np.uint8)
    parts = np.split(data, np.cumsum(sizes))
    real, n_calls = os.write, 0

    def short(descriptor: int, buffer: memoryview) -> int:
        nonlocal n_calls
        n_calls += 1
        return real(descriptor, buffer if most is None or n_calls > 50 else buffer[:most])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", short)
        assert write_file(path, parts) == data.size
    assert n_calls > 0
    assert path.read_bytes() == data.tobytes()


def test_file_system_that_refuses_to_bypass_the_page_cache_is_written_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = np.random.default_rng(0).integers(0, 256, 2 * LEAST_BYTES + 77, dtype=np.uint8)
    real = os.write

    def refuse_direct(descriptor: int, buffer: memoryview) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return real(descriptor, buffer)

    monkeypatch.setattr(os, "write", refuse_direct)
    write_file(tmp_path / "late", [data])
    write_file(tmp_path / "never", [data], direct_bytes=None)
    assert (tmp_path / "late").read_bytes() == (tmp_path / "never").read_bytes() == data.tobytes()


def test_full_disk_in_a_large_file_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match=r"cannot write .*/acts .*disk is full"):
        write_file(tmp_path / "acts", [np.zeros(2 * LEAST_BYTES, np.uint8)])
    assert contents(tmp_path) == set()
