"""The tree of errors: what crosses to another process is the same error there."""

import json

import pytest

from sandyard.server.core import errors
from sandyard.server.core.errors import (
    InternalError,
    MachineDeadError,
    RateLimitedError,
    SandyardError,
    UnavailableError,
    error_of,
    kind_of,
)

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type)
    and issubclass(kind, SandyardError)
    and kind not in (SandyardError, RateLimitedError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_crosses_to_another_process_as_itself(kind: type[SandyardError]) -> None:
    error = kind("cannot use {field}: no", field="idle_timeout", limit=3)
    words = json.dumps([kind_of(error), error.code.value, error.text, error.facts])
    there = error_of(*json.loads(words))
    assert type(there) is kind
    assert (there.message, there.facts) == (error.message, error.facts)
    assert there.message == "cannot use idle_timeout: no"
    assert there.message_with(str.upper) == "cannot use IDLE_TIMEOUT: no"


def test_one_of_another_version_is_taken_by_its_code() -> None:
    there = error_of("OfTomorrowError", "unavailable", "not now", {"self": 1, "text": 2})
    assert type(there) is UnavailableError
    assert there.facts == {}
    assert type(error_of("OfTomorrowError", "of_tomorrow", "x", {})) is InternalError


def test_a_dead_machine_has_the_status_of_its_sandbox() -> None:
    assert MachineDeadError("x").facts == {"status": "error"}


@pytest.mark.parametrize("text", ["{field}", "{field!r} {0} {} {{field}} %s", "{limit}"])
def test_braces_of_a_users_own_are_left_alone(text: str) -> None:
    assert SandyardError(text).message == text
