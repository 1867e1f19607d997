"""Sums in a fixed order: the same brackets in any order of arrival, and however the tree is divided over jobs."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from residua.analysis.support.kept import kept, kept_bytes, let_go
from residua.analysis.support.sums import OrderedSum, Share, in_order, joined, shares, sum_share, total_of


def bracketed(first: str, second: str) -> str:
    return f"({first}{second})"


@given(st.permutations(range(11)), st.integers(1, 11))
def test_a_sum_does_not_depend_on_the_order_of_arrival(order: list[int], n_terms: int) -> None:
    total, expected = OrderedSum(n_terms, bracketed), OrderedSum(n_terms, bracketed)
    answers = [total.add(index, f"{index:x}") for index in order if index < n_terms]
    assert answers[:-1] == [None] * (n_terms - 1)
    assert answers[-1] == [expected.add(index, f"{index:x}") for index in range(n_terms)][-1]
    assert str(answers[-1]).replace("(", "").replace(")", "") == "0123456789a"[:n_terms]


@given(st.permutations(range(11)))
def test_results_come_in_the_order_of_their_jobs(order: list[int]) -> None:
    assert list(in_order((number, f"{number:x}") for number in order)) == list("0123456789a")


@given(n_leaves=st.integers(1, 200), n_shares=st.integers(1, 40), n_joined=st.integers(2, 9))
def test_however_the_leaves_are_shared_the_tree_is_the_same(n_leaves: int, n_shares: int, n_joined: int) -> None:
    divided = shares(n_leaves, n_shares)
    assert [leaf for share in divided for leaf in range(*share)] == list(range(n_leaves))
    assert len(divided) <= n_shares
    sizes = [stop - start for start, stop in divided]
    assert max(sizes) <= 1.2 * n_leaves / min(n_shares, n_leaves) + 1
    parts = [sum_share(lambda leaf: f"{leaf},", share, n_leaves, bracketed) for share in divided]
    while len(parts) > 1:
        parts = [joined(parts[i : i + n_joined], n_leaves, bracketed) for i in range(0, len(parts), n_joined)]
    expected = OrderedSum(n_leaves, bracketed)
    assert total_of(parts[0]) == [expected.add(leaf, f"{leaf},") for leaf in range(n_leaves)][-1]


def test_joining_leaves_partial_sums_as_they_are() -> None:
    """A merge that changes its first argument; Dask may need a partial sum twice."""

    def add(first: list[int], second: list[int]) -> list[int]:
        first += second
        return first

    parts = [sum_share(lambda leaf: [leaf], Share(start, start + 3), 12, add) for start in range(0, 12, 3)]
    for _ in range(2):
        assert total_of(joined(parts, 12, add)) == list(range(12))


@pytest.fixture
def analyses() -> Iterator[None]:
    yield
    for name in ("one", "other"):
        let_go(name)


@pytest.mark.usefixtures("analyses")
def test_values_are_kept_while_they_fit_and_another_analysis_takes_their_place() -> None:
    made: list[str] = []

    def value(analysis: str, key: int) -> bytes:
        def make() -> bytes:
            made.append(f"{analysis} {key}")
            return bytes(40)

        return kept(analysis, key, make, len, most_bytes=100)

    for _ in range(2):
        assert [len(value("one", key)) for key in range(3)] == [40] * 3
    assert made == ["one 0", "one 1", "one 2", "one 2"]
    assert kept_bytes() == 80
    for _ in range(2):
        assert [len(value("other", key)) for key in range(2)] == [40] * 2
    assert made[4:] == ["other 0", "other 1"]
    assert kept_bytes() == 80
    let_go("other")
    assert kept_bytes() == 0
