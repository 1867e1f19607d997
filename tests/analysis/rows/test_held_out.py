"""Held-out examples depend on number and seed alone."""

import doctest

import numpy as np
import pytest

from residua.analysis.rows import held_out as module
from residua.analysis.rows.held_out import held_out, held_out_groups
from residua.store.base.errors import AnalysisError


def splitmix(state: int) -> int:
    """Return SplitMix64's output, translated from its published C code to Python integers."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@pytest.mark.parametrize("seed", [0, 7, -1])
def test_the_hash_is_splitmix_of_seed_and_number(seed: int) -> None:
    expected = [splitmix((splitmix(seed % 2**64) + i) % 2**64) < 0.25 * 2**64 for i in range(200)]
    assert held_out(np.arange(200), fraction=0.25, seed=seed).tolist() == expected


def test_the_answer_does_not_depend_on_the_block() -> None:
    examples = np.random.default_rng(0).integers(0, 1000, (4, 500))
    by_number = held_out(np.arange(1000), seed=3)
    np.testing.assert_array_equal(held_out(examples, seed=3), by_number[examples])


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5])
def test_the_fraction_is_right_and_seeds_are_independent(fraction: float) -> None:
    n = 200_000
    first, second = (held_out(np.arange(n), fraction=fraction, seed=seed) for seed in (0, 1))
    for found, expected in ((first, fraction), (second, fraction), (first & second, fraction**2)):
        deviation = np.sqrt(expected * (1 - expected) / n)
        assert abs(found.mean() - expected) < 5 * deviation


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_must_leave_something_on_both_sides(fraction: float) -> None:
    with pytest.raises(AnalysisError, match=r"between 0 and 1"):
        held_out(np.arange(3), fraction=fraction)
    with pytest.raises(AnalysisError, match=r"between 0 and 1"):
        held_out_groups(np.arange(3), fraction=fraction)


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("n_groups", [2, 3, 10, 1000])
def test_groups_are_held_out_as_a_whole_and_in_the_right_number(n_groups: int, fraction: float) -> None:
    rng = np.random.default_rng(n_groups)
    groups = np.concatenate([np.arange(n_groups), rng.integers(0, n_groups, 3 * n_groups)])
    for seed in (0, 1):
        held = held_out_groups(groups, fraction=fraction, seed=seed)
        sides = {int(group): {*held[groups == group].tolist()} for group in np.unique(groups)}
        assert all(len(side) == 1 for side in sides.values())
        n_held = sum(True in side for side in sides.values())
        assert n_held == min(n_groups - 1, max(1, round(fraction * n_groups)))
    other = held_out_groups(groups, fraction=fraction, seed=7)
    assert n_groups < 1000 or (other != held).any()


def test_each_kind_has_groups_on_both_sides() -> None:
    kinds = np.repeat([5, 7, 9, 11], [1, 2, 3, 94])
    held = held_out_groups(np.arange(100), fraction=0.2, kinds=kinds)
    assert np.bincount(kinds, held)[[5, 7, 9, 11]].tolist() == [0, 1, 1, 19]
    assert held_out_groups(np.zeros(0, np.int64)).tolist() == []


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(module) == (0, 2)
