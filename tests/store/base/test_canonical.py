"""Canonical JSON: equal content has equal bytes, whatever the order of its keys."""

import hashlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from residua.store.base.canonical import canonical_json, differences, digest_of, flatten

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


def reference(value: object) -> str:
    """Write `value` by the rule of the format page, with json for scalars only."""
    if isinstance(value, list):
        return "[" + ",".join(map(reference, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{reference(key)}:{reference(value[key])}" for key in sorted(value)) + "}"
    return json.dumps(value, ensure_ascii=False)


def reversed_everywhere(value: object) -> object:
    if isinstance(value, list):
        return [reversed_everywhere(item) for item in value]
    if isinstance(value, dict):
        return {key: reversed_everywhere(value[key]) for key in reversed(value)}
    return value


@given(VALUES)
def test_canonical_json_is_that_of_the_format_page(value: object) -> None:
    assert canonical_json(value) == reference(value).encode()
    assert json.loads(canonical_json(value)) == value


@given(VALUES)
def test_the_order_of_keys_does_not_matter(value: object) -> None:
    assert digest_of(value) == digest_of(reversed_everywhere(value))


def test_the_digest_is_the_sha256_of_the_bytes() -> None:
    text = '{"a":[1,2.5,null,true],"b":"é / \\" \\n"}'
    assert digest_of({"b": 'é / " \n', "a": (1, 2.5, None, True)}) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, [math.nan], "\ud800", {"\udfff": 1}])
def test_what_json_cannot_express_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"JSON compliant|surrogates"):
        canonical_json(value)


def test_flattening_keeps_every_leaf_under_its_dotted_name() -> None:
    nested = {"a": {"b": {"c": 1, "d": [{"e": 2}]}, "empty": {}}, "f": None}
    assert flatten(nested) == {"a.b.c": 1, "a.b.d": [{"e": 2}], "a.empty": {}, "f": None}


def test_of_long_values_the_place_is_shown_where_they_differ() -> None:
    long = "x" * 500
    (line,) = differences({"template": long + "A", "a": 1}, {"template": long + "B", "a": 1}, ("one", "other"))
    assert line.startswith("template: one has ...x")
    assert 'xA"' in line
    assert 'xB"' in line
    assert len(line) < 300
    (line,) = differences({"a": long}, {"a": None}, ("one", "other"))
    assert line.startswith('a: one has "xxx')
    assert line.endswith("other has null")
