"""Position rules against a brute-force reading of their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from residua.store.base.errors import DatasetError
from residua.store.selection.positions import kept_positions, marks_of, parse_positions


@given(
    text=st.sampled_from(["all", "last", "every:1", "every:3", "every:100", "assistant", "column:keep"]),
    tokens=st.lists(st.tuples(st.booleans(), st.booleans()), max_size=20),
    drop=st.booleans(),
)
def test_kept_positions_follow_the_rule(text: str, tokens: list[tuple[bool, bool]], drop: bool) -> None:
    rule = parse_positions(text)
    marked, special = ([pair[i] for pair in tokens] for i in (0, 1))
    kept = kept_positions(
        rule,
        len(tokens),
        marked=np.array(marked, np.bool_) if rule.kind == "marked" else None,
        dropped=np.array(special, np.bool_) if drop else None,
    )
    allowed = [i for i in range(len(tokens)) if not (drop and special[i])]
    if text == "last":
        expected = allowed[-1:]
    elif text.startswith("every"):
        expected = [i for i in allowed if i in range(0, len(tokens), int(text.partition(":")[2]))]
    elif text == "all":
        expected = allowed
    else:
        expected = [i for i in allowed if marked[i]]
    assert kept.tolist() == expected
    assert str(kept.dtype) == "int32"


@pytest.mark.parametrize(
    "text", ["", "first", "every", "every:", "every:0", "every:-2", "every:²", "column:", "last:2"]
)
def test_other_rules_are_refused_in_the_users_words(text: str) -> None:
    with pytest.raises(DatasetError, match=f"positions='{text}': give one of all, last, every:N"):
        parse_positions(text)


def test_a_column_may_have_a_colon_in_its_name() -> None:
    assert parse_positions("column:a:b").column == "a:b"


@given(mask=st.lists(st.booleans(), max_size=12))
def test_a_mask_and_its_positions_mark_the_same(mask: list[bool]) -> None:
    by_mask = marks_of(mask, len(mask), column="c", row=0)
    by_position = marks_of([i for i, flag in enumerate(mask) if flag], len(mask), column="c", row=0)
    assert by_mask.tolist() == by_position.tolist() == mask


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0, 3], "position 3 is not in the example, which has 3 tokens"),
        ([-1], "position -1 is not in the example"),
        ([1, 1], "named twice"),
        ([True, False], "the mask has 2 entries, the example has 3 tokens"),
        ([0.5], "give a list of positions or"),
        ([[0], [1, 2]], "give a list of positions or"),
        ("text", "give a list of positions or"),
        (None, "give a list of positions or"),
    ],
)
def test_marks_that_do_not_fit_name_the_row(value: object, message: str) -> None:
    with pytest.raises(DatasetError, match=f"column 'c', row 7: .*{message}"):
        marks_of(value, 3, column="c", row=7)
