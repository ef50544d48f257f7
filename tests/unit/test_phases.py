"""What a node does with a machine in which phase: every ask meets every phase."""

import pytest

from sandyard.server.core.contracts.node import Origin, Phase
from sandyard.server.node.machines.phases import NEWER, ORIGINS, SAME, Ask, Step, step_of

AT_REST = [None, *(one for one in Phase if one not in (Phase.WAITING, Phase.UNKNOWN))]
"""What waits in the pool is no sandbox's: nobody asks for it by name. Of its own machines, a node
knows every phase."""
REFUSED = {Step.ABSENT, Step.OVERTAKEN, Step.DEAD, Step.NOT_NOW}
LOSES = {Step.START, Step.REPLACE}
"""What begins with nothing of what was there."""


@pytest.mark.parametrize("is_newer", [True, False])
@pytest.mark.parametrize("ask", Ask)
def test_every_ask_meets_every_phase(ask: Ask, is_newer: bool) -> None:
    for phase in AT_REST:
        assert isinstance(step_of(ask, phase, is_newer=is_newer), Step)
    assert set((NEWER if is_newer else SAME)[ask]) == set(AT_REST)


def test_every_step_is_taken_and_every_origin_is_an_ask() -> None:
    taken = {step for table in (NEWER, SAME) for row in table.values() for step in row.values()}
    assert taken == set(Step)
    assert set(ORIGINS) == set(Origin)


def test_a_wish_that_comes_again_loses_nothing_that_was_there_once() -> None:
    """Only what a failed start left may go: that never was a sandbox anybody used."""
    for ask in Ask:
        for phase in set(AT_REST) - {None, Phase.STARTING}:
            assert step_of(ask, phase, is_newer=False) not in LOSES, (ask, phase)


def test_only_a_later_create_takes_the_place_of_what_lives() -> None:
    for ask in set(Ask) - {Ask.CREATE}:
        for phase in (Phase.RUNNING, Phase.HELD, Phase.PAUSED, Phase.WAKING, Phase.DEAD):
            assert step_of(ask, phase, is_newer=True) not in LOSES, (ask, phase)


def test_what_is_not_there_can_only_be_made() -> None:
    for ask in Ask:
        for is_newer in (True, False):
            step = step_of(ask, None, is_newer=is_newer)
            assert step is (Step.START if ask in (Ask.CREATE, Ask.FROM_SNAPSHOT) else Step.ABSENT)


def test_only_what_runs_and_was_woken_is_opened_and_only_as_the_incarnation_it_is() -> None:
    opened = [one for one in AT_REST if step_of(Ask.OPEN, one, is_newer=False) is Step.OPEN]
    assert opened == [Phase.RUNNING, Phase.HELD]
    for phase in AT_REST:
        assert step_of(Ask.OPEN, phase, is_newer=True) in REFUSED
