"""A process that writes to a store beside others: `python -m tests.support.writer URL TIMES`.

Each time it moves a cent between the accounts of two organizations, which it does alone, and adds
one to what each has used, which it does in that organization's turn.
"""

import asyncio
import sys
from dataclasses import replace

from sandyard.server.core.contracts.store import Transaction, Turn
from sandyard.server.links.sql import open_store


async def _use(tx: Transaction, org_id: str) -> None:
    account = await tx.credits.account(org_id)
    await tx.credits.save(replace(account, used_cents=account.used_cents + 1))


async def write(url: str, times: int, key: bytes) -> None:
    """Do all of that so many times, several at once."""
    async with open_store(url, key=key) as store:
        async with store.read() as tx:
            one, other = (found.id for found in await tx.organizations.every())

        async def move() -> None:
            async with store.write(Turn.ALONE) as tx:
                giver, taker = await tx.credits.account(one), await tx.credits.account(other)
                giver = replace(giver, balance_cents=giver.balance_cents - 1)
                taker = replace(taker, balance_cents=taker.balance_cents + 1)
                await tx.credits.save(giver)
                await tx.credits.save(taker)

        async def use(org_id: str) -> None:
            async with store.write(org_id) as tx:
                await _use(tx, org_id)

        for _ in range(times):
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(move())
                tasks.create_task(use(one))
                tasks.create_task(use(other))


if __name__ == "__main__":
    asyncio.run(write(sys.argv[1], int(sys.argv[2]), sys.argv[3].encode()))
