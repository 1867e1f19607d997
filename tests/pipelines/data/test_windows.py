"""Windows: put together again they are the source, none is too long, and none is empty."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from residua.pipelines.data.windows import Window, cut_windows
from residua.store.base.errors import DatasetError


@given(n_tokens=st.integers(0, 200), n_start=st.integers(0, 3), room=st.integers(1, 40))
def test_windows_follow_one_another_without_gap(n_tokens: int, n_start: int, room: int) -> None:
    max_length = n_start + room
    windows = cut_windows(n_tokens, max_length, n_start)
    assert [i for window in windows for i in range(window.start, window.stop)] == list(range(n_tokens))
    assert all(window.n_tokens <= max_length for window in windows)
    assert all(window.n_tokens == max_length for window in windows[:-1])
    assert [window.n_added for window in windows] == [0] + [n_start] * (len(windows) - 1)
    assert all(window.stop > window.start for window in windows) or n_tokens == 0


def test_a_source_that_fits_is_one_window() -> None:
    assert cut_windows(4, 4, 1) == [Window(0, 4)]
    assert cut_windows(1, 1, 1) == [Window(0, 1)]


def test_no_room_beside_the_start_tokens() -> None:
    with pytest.raises(DatasetError, match=r"--max-length 2 leaves no room beside the 2 start tokens .* at least 3"):
        cut_windows(10, 2, 2)
