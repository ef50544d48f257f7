"""Bounds on JSON, kept while it arrives in pieces."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.front.bounds import DEPTH_MAX, VALUES_MAX, JsonBounds

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def fed(body: bytes, size: int) -> JsonBounds:
    bounds = JsonBounds()
    for start in range(0, len(body), size):
        bounds.feed(body[start : start + size])
    return bounds


@given(VALUES, st.integers(1, 7), st.booleans())
def test_what_is_small_passes_however_it_is_cut(value: object, size: int, is_ascii: bool) -> None:
    fed(json.dumps(value, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass"), size)


@pytest.mark.parametrize("size", [1, 3, 65536])
def test_depth_and_number_are_bounded_and_strings_are_not_counted(size: int) -> None:
    for body in (b"[" * (DEPTH_MAX + 1), b'{"a":' * (DEPTH_MAX + 1), b"[1" + b",1" * VALUES_MAX):
        with pytest.raises(InvalidArgumentError, match="cannot take the body"):
            fed(body, size)
    fed(b"[" * DEPTH_MAX + b"]" * DEPTH_MAX + b"[[[]]]", size)
    fed(json.dumps({"a": '[{,"\\' * VALUES_MAX}).encode(), size)
    # Beside one another they are not deep, whatever they add up to.
    fed(b"[" + b"[]," * (DEPTH_MAX * 3) + b"[]]", size)


def test_strings_without_anything_between_them_are_no_json() -> None:
    with pytest.raises(InvalidArgumentError, match="not JSON"):
        fed(b'"' * 1000, 7)
