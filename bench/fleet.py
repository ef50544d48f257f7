"""Many at once on PostgreSQL: what writers of several organizations reach together.

    .venv/bin/python -m bench.fleet [--seconds 5]

The PostgreSQL is one of the bench's own, which waits for the disk at each commit, as one that keeps
what it was given does. Beside what organizations write in turns of their own stands the same with
one turn for all: the same statements, in the same run.
"""

import argparse
import asyncio
import json
import time
from dataclasses import replace
from datetime import UTC, datetime

from tests.support import postgres
from tests.support.ports import free_port

from sandyard.server.core.contracts.store import Store, Turn
from sandyard.server.core.ids import new_sandbox_id, new_uuid
from sandyard.server.core.records import Organization, Project, Sandbox, User
from sandyard.server.core.shapes import Shape
from sandyard.server.core.states import Status
from sandyard.server.links.sql import open_store

_ORGANIZATIONS, _WRITERS_EACH = 16, 2
_NOW = datetime(2026, 1, 1, tzinfo=UTC)


async def _furnished(store: Store) -> list[Sandbox]:
    """Return a pattern of a sandbox for each organization."""
    patterns = []
    async with store.write(Turn.ALONE) as tx:
        user = User(new_uuid(), "bench@example.org", "Bench", _NOW)
        await tx.users.add(user)
        for number in range(_ORGANIZATIONS):
            org, project = new_uuid(), new_uuid()
            await tx.organizations.add(
                Organization(org, f"Org {number}", org, _NOW),
                Project(project, org, "Default", "default", True, _NOW),
            )
            patterns.append(
                Sandbox(
                    id="", org_id=org, owner_user_id=user.id, project_id=project, name=None,
                    status=Status.FAILED, version=1, incarnation=1, template="t",
                    shape=Shape(1, 512, 1024), idle_timeout_s=600, created_at=_NOW,
                    updated_at=_NOW,
                )
            )  # fmt: skip
    return patterns


async def _rate(stores: list[Store], patterns: list[Sandbox], seconds: float, turn: bool) -> float:
    """Return how many transactions a second all writers get through together."""
    until, done = time.perf_counter() + seconds, 0

    async def write(store: Store, pattern: Sandbox) -> None:
        nonlocal done
        while time.perf_counter() < until:
            async with store.write(pattern.org_id if turn else Turn.ALONE) as tx:
                await tx.sandboxes.insert(replace(pattern, id=new_sandbox_id()))
            done += 1

    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for number, pattern in enumerate(patterns):
            for writer in range(_WRITERS_EACH):
                tasks.create_task(write(stores[(number + writer) % len(stores)], pattern))
    return done / (time.perf_counter() - began)


async def _writes(seconds: float) -> dict[str, float]:
    async with (
        postgres.postgres_url() as url,
        open_store(url, key=b"k" * 32) as one,
        open_store(url, key=b"k" * 32) as other,
    ):
        patterns = await _furnished(one)
        stores = [one, other]
        await _rate(stores, patterns, 1, turn=True)
        alone, turns = [], []
        for _ in range(3):
            alone.append(await _rate(stores, patterns, seconds, turn=False))
            turns.append(await _rate(stores, patterns, seconds, turn=True))
    middle = sorted(turns)[1], sorted(alone)[1]
    return {
        "writes_a_second": round(middle[0], 1),
        "writes_a_second_in_one_turn": round(middle[1], 1),
        "ratio": round(middle[0] / middle[1], 2),
    }


def main() -> None:
    """Measure, and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5)
    given = parser.parse_args()
    folder = postgres.start_server(free_port(), is_durable=True)
    try:
        print(json.dumps(asyncio.run(_writes(given.seconds)), indent=2))
    finally:
        postgres.stop_server(folder)


if __name__ == "__main__":
    main()
