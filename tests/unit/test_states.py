"""The table of transitions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandyard.server.core.errors import ConflictError
from sandyard.server.core.states import BILLED, HIDDEN, TRANSITIONS, Event, Status, advance


def reachable(start: Status) -> set[Status]:
    found, front = {start}, [start]
    while front:
        for following in TRANSITIONS[front.pop()].values():
            if following not in found:
                found.add(following)
                front.append(following)
    return found


def test_every_status_has_a_row_and_every_event_is_used() -> None:
    assert set(TRANSITIONS) == set(Status)
    assert {event for row in TRANSITIONS.values() for event in row} == set(Event)


def test_every_status_is_reachable_from_where_a_create_begins() -> None:
    assert reachable(Status.CREATING) == set(Status)


def test_a_start_that_is_begun_anew_is_still_one_that_never_came_up() -> None:
    assert advance(Status.CREATING, Event.AGAIN) is Status.CREATING
    assert advance(Status.CREATING, Event.DISPLACED) is Status.PENDING
    assert advance(Status.PENDING, Event.PLACED) is Status.CREATING


def test_every_status_can_still_be_destroyed() -> None:
    for status in Status:
        assert Status.DESTROYED in reachable(status)


def test_delete_works_from_every_status_but_destroyed() -> None:
    for status in Status:
        assert (Event.DELETE in TRANSITIONS[status]) is (status is not Status.DESTROYED)


def test_a_step_that_fails_goes_back_to_what_is_intact() -> None:
    assert advance(Status.PAUSING, Event.PAUSE_FAILED) is Status.RUNNING
    assert advance(Status.RESUMING, Event.RESUME_FAILED) is Status.PAUSED


def test_nothing_hidden_is_billed() -> None:
    assert not HIDDEN & BILLED


@given(st.sampled_from(Status), st.sampled_from(Event))
def test_an_event_out_of_place_is_refused(status: Status, event: Event) -> None:
    if event in TRANSITIONS[status]:
        assert advance(status, event) is TRANSITIONS[status][event]
        return
    with pytest.raises(ConflictError) as caught:
        advance(status, event)
    assert caught.value.facts == {"status": status.value}


@given(st.lists(st.sampled_from(Event), max_size=40))
def test_destroyed_is_the_end(events: list[Event]) -> None:
    status = Status.PENDING
    for event in events:
        try:
            following = advance(status, event)
        except ConflictError:
            continue
        assert status is not Status.DESTROYED
        status = following
