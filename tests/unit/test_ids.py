"""Ids and names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandyard.server.core import ids
from sandyard.server.core.errors import InvalidArgumentError


def test_a_new_id_is_recognised() -> None:
    assert ids.is_sandbox_id(ids.new_sandbox_id())
    assert ids.new_sandbox_id() != ids.new_sandbox_id()


@pytest.mark.parametrize(
    "text", ["sandbox-", "sandbox-ABCDEFGHIJKL", "sandbox-abc", "sandbox-abcdefghijkl\n", "x"]
)
def test_other_forms_are_no_ids(text: str) -> None:
    assert not ids.is_sandbox_id(text)


def test_keys_carry_their_kind_and_are_stored_as_digests() -> None:
    key = ids.new_api_key()
    assert key.startswith("rt_live_")
    assert len(key) == len("rt_live_") + 32
    assert ids.new_api_key(is_test=True).startswith("rt_test_")
    assert key not in ids.digest_of_key(key)
    assert len(ids.digest_of_key(key)) == 64


@pytest.mark.parametrize("name", ["a", "My box", "ünï", "x" * 63])
def test_names_that_are_fine(name: str) -> None:
    assert ids.checked_name(name) == name


@pytest.mark.parametrize(
    "name", ["", " ", "x" * 64, "a\nb", "a\x00b", "sandbox-abcdefghijkl", "\ud800", "\x7f"]
)
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError):
        ids.checked_name(name)


def test_tags_lose_repeats_and_keep_order() -> None:
    assert ids.checked_tags(["b", "a", "b"]) == ("b", "a")


@pytest.mark.parametrize("tags", [["t"] * 33, [""], ["x" * 65], ["a\x00"]])
def test_bad_tags_are_refused(tags: list[str]) -> None:
    with pytest.raises(InvalidArgumentError):
        ids.checked_tags(tags)


@given(st.one_of(st.none(), st.text(max_size=80)))
def test_a_hostname_is_always_a_valid_label(name: str | None) -> None:
    label = ids.hostname_of(name, "sandbox-abcdefghijkl")
    assert 1 <= len(label) <= 63
    assert set(label) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert label == label.strip("-")
