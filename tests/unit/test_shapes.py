"""Sizes and shapes."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.shapes import Shape, format_size, parse_size, shape_of

DEFAULT = Shape(2, 4096, 10240)


@pytest.mark.parametrize(
    ("text", "mib"),
    [("4GB", 4096), ("1024MB", 1024), ("512MiB", 512), ("1GiB", 1024), ("0MB", 0)],
)
def test_sizes_are_read_in_binary_units(text: str, mib: int) -> None:
    assert parse_size(text, field="memory") == mib


@pytest.mark.parametrize(
    "text", ["", "4", "GB", "4 GB", "4gb", "-1GB", "+1GB", "1.5GB", "1e3MB", "4GB\n", "٤GB", "4TB"]
)
def test_nonsense_is_refused_with_the_field(text: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_size(text, field="resources.memory")
    assert caught.value.facts == {"field": "resources.memory"}


@given(st.integers(1, 2**20))
def test_what_is_printed_is_read_back(mib: int) -> None:
    assert parse_size(format_size(mib), field="disk") == mib


@given(st.text(max_size=12))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidArgumentError):
        assert parse_size(text, field="disk") >= 0


def test_what_is_not_asked_for_is_the_default() -> None:
    assert shape_of(DEFAULT) == DEFAULT
    assert shape_of(DEFAULT, memory="1GB") == Shape(2, 1024, 10240)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"vcpus": 0}, "resources.vcpus"),
        ({"vcpus": 33}, "resources.vcpus"),
        ({"memory": "127MB"}, "resources.memory"),
        ({"memory": "65GB"}, "resources.memory"),
        ({"disk": "1023MB"}, "resources.disk"),
        ({"disk": "501GB"}, "resources.disk"),
    ],
)
def test_out_of_range_is_refused(asked: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        shape_of(DEFAULT, **asked)  # type: ignore[arg-type]
    assert caught.value.facts["field"] == field
