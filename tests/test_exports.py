"""The public names of `residua` are listed, sorted and importable."""

import pytest

import residua


def test_public_names_are_sorted_and_exist() -> None:
    assert residua.__all__ == sorted(residua.__all__)
    for name in residua.__all__:
        assert getattr(residua, name).__doc__, f"residua.{name} has no docstring"


def test_the_list_of_public_names_is_short() -> None:
    assert len(residua.__all__) <= 35


def test_an_error_for_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'capture_data'.*capture_dataset"):
        residua.capture_data  # noqa: B018  # the lookup is the test


def test_dir_lists_the_public_names() -> None:
    assert set(residua.__all__) <= set(dir(residua))


def test_a_former_name_works_and_warns() -> None:
    with pytest.warns(DeprecationWarning, match=r"whole_parameter.*full_parameter"):
        assert residua.whole_parameter is residua.full_parameter
