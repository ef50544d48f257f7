"""What is used is charged, to the last microsecond, whatever happens in between."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from math import floor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.clock import DrivenClock
from tests.support.postgres import postgres_url
from tests.support.store import place_database, recounted

from sandyard.server.core.contracts.store import Store, Turn
from sandyard.server.core.errors import SandyardError
from sandyard.server.core.ids import new_sandbox_id, new_uuid
from sandyard.server.core.money import MICROS, PriceList, Prices
from sandyard.server.core.records import Sandbox, StoragePeriod, User
from sandyard.server.core.shapes import Shape
from sandyard.server.core.states import Event, Status
from sandyard.server.links.local import LocalBus
from sandyard.server.links.payments import NoPayments
from sandyard.server.links.sql import open_store
from sandyard.server.service.money.credits import credit
from sandyard.server.service.money.metering import Meter
from sandyard.server.service.people.organizations import SignUp, found_organization
from sandyard.server.service.sandboxes.lifecycle import Lifecycle

START = datetime(2026, 5, 6, 10, 0, 0, 123456, tzinfo=UTC)
PRICES = Prices(5 * MICROS, 1_500_000, 10 * MICROS, 10 * MICROS)
HOUR_US = 3_600_000_000
FIRST, LAST = datetime(1970, 1, 1, tzinfo=UTC), datetime(9000, 1, 1, tzinfo=UTC)


@dataclass
class Life:
    """A sandbox as an exact model knows it: when it was charged, and for what."""

    sandbox: Sandbox
    computes: list[tuple[datetime, datetime | None]] = field(default_factory=list)
    stores: list[tuple[int, datetime, datetime | None]] = field(default_factory=list)

    def opened(self, at: datetime) -> None:
        self.computes.append((at, None))

    def closed(self, at: datetime) -> None:
        if self.computes and self.computes[-1][1] is None:
            start = self.computes[-1][0]
            self.computes[-1] = (start, max(start, at))

    def stored(self, size: int, at: datetime) -> None:
        self.stores.append((size, at, None))

    def fetched(self, at: datetime) -> None:
        if self.stores and self.stores[-1][2] is None:
            size, start, _ = self.stores[-1]
            self.stores[-1] = (size, start, max(start, at))

    def split(self, at: datetime) -> None:
        """Prices change: what is in use begins anew."""
        if self.computes and self.computes[-1][1] is None and self.computes[-1][0] < at:
            self.closed(at)
            self.opened(at)
        if self.stores and self.stores[-1][2] is None and self.stores[-1][1] < at:
            size = self.stores[-1][0]
            self.fetched(at)
            self.stored(size, at)

    def cost(self, now: datetime, changes: Sequence[tuple[datetime, Prices]] = ()) -> int:
        """Return what it costs; `changes` are later prices, and when they came."""
        if self.sandbox.is_test:
            return 0
        shape, total = self.sandbox.shape, 0
        moments = [FIRST, *(at for at, _ in changes), LAST]
        for number, prices in enumerate([PRICES, *(one for _, one in changes)]):
            since, until = moments[number], moments[number + 1]
            hourly = (
                shape.vcpus * prices.vcpu_hour
                + Fraction(shape.memory_mib * prices.memory_gib_hour, 1024)
                + Fraction(shape.disk_mib * prices.disk_gib_month, 1024 * 730)
            )
            for start, end in self.computes:
                held = _us(max(since, start), min(until, end or now))
                total += floor(Fraction(held, HOUR_US) * hourly)
            for size, start, end in self.stores:
                held = _us(max(since, start), min(until, end or now))
                months = Fraction(held, 730 * HOUR_US)
                total += floor(months * size * prices.storage_gib_month / 2**30)
        return total


def _us(start: datetime, end: datetime) -> int:
    return max(0, (end - start) // timedelta(microseconds=1))


class Bench:
    """A store, and what charges; nothing behind it runs."""

    server_id = "server"

    def __init__(self, store: Store, org_id: str, user_id: str, project_id: str) -> None:
        self.store, self.org_id, self.user_id = store, org_id, user_id
        self.project_id = project_id
        self.clock = DrivenClock(START)
        self.lives: list[Life] = []
        self.changes: list[tuple[datetime, Prices]] = []
        self.restart()

    @property
    def prices(self) -> PriceList:
        return PriceList(((FIRST, PRICES), *self.changes))

    async def change_prices(self, prices: Prices) -> None:
        """Start the server again with other prices."""
        now = self.clock.now()
        if now > self.prices.entries[-1][0] and prices != self.prices.latest:
            self.changes.append((now, prices))
            self.restart()
            await self.meter.charge_all()
            await self.learn_prices()

    async def learn_prices(self) -> None:
        """Have the model know when prices changed: this clock goes on whenever it is read."""
        async with self.store.read() as tx:
            known = await tx.prices.history()
        assert known is not None
        assert known.latest == self.prices.latest
        self.changes = list(known.entries[1:])
        for life in self.lives:
            life.split(known.entries[-1][0])

    def restart(self) -> None:
        self.lifecycle = Lifecycle(self.store, LocalBus(self.clock), self.clock)
        self.meter = Meter(
            store=self.store, lifecycle=self.lifecycle, payments=NoPayments(), clock=self.clock,
            prices=self.prices.latest, server_id=self.server_id, enforces=False,
        )  # fmt: skip

    async def create(self, shape: Shape, *, is_test: bool = False) -> Life:
        now = self.clock.now()
        sandbox = Sandbox(
            id=new_sandbox_id(), org_id=self.org_id, owner_user_id=self.user_id,
            project_id=self.project_id, name=None, status=Status.CREATING,
            version=1, incarnation=1, template="t", shape=shape, idle_timeout_s=0, created_at=now,
            updated_at=now, is_test=is_test,
        )  # fmt: skip
        async with self.store.write(Turn.ALONE) as tx:
            await tx.sandboxes.insert(sandbox)
        life = Life(sandbox)
        self.lives.append(life)
        await self.apply(life, Event.READY)
        return life

    async def apply(self, life: Life, event: Event, **changes: object) -> None:
        before = life.sandbox.status
        try:
            stored = await self.lifecycle.apply(life.sandbox, event, **changes)  # type: ignore[arg-type]
        except SandyardError:
            return
        assert stored is not None
        # To the microsecond: one more fills another micro now and then.
        life.sandbox, now = stored, stored.updated_at
        if before is Status.RUNNING and stored.status is not Status.RUNNING:
            life.closed(now)
        if before is Status.PAUSED and stored.status is not Status.PAUSED:
            life.fetched(now)
        if stored.status is Status.RUNNING and before is not Status.RUNNING:
            life.opened(now)
        if stored.status is Status.PAUSED and before is not Status.PAUSED:
            life.stored(stored.saved_bytes, now)

    async def check(self) -> None:
        """Compare the account and the ledger with the model, exactly."""
        await self.meter.charge(self.org_id)
        async with self.store.read() as tx:
            account = await tx.credits.account(self.org_id)
            entries = await tx.credits.history(self.org_id, limit=100_000)
            periods = await tx.usage.unsettled(self.org_id)
            kept = await tx.storage.unsettled(self.org_id)
        now = self.clock.now()
        # What is below a cent may wait in the periods themselves.
        waiting = 0
        for one in periods:
            cost = self.prices.compute(one.shape, one.started_at, one.ended_at or now)
            waiting += (0 if one.is_free else cost) - one.posted
        for two in kept:
            cost = self.prices.storage(two.size_bytes, two.started_at, two.ended_at or now)
            waiting += (0 if two.is_free else cost) - two.posted
        used = account.used_cents * MICROS + account.carried + waiting
        assert used == sum(life.cost(now, self.changes) for life in self.lives)
        balance = 0
        for entry in reversed(entries):
            balance += entry.amount_cents
            assert entry.balance_after_cents == balance
        assert balance == account.balance_cents
        assert account.balance_cents == account.granted_cents - account.used_cents


async def with_bench(work: object, url: str) -> None:
    if url.startswith("sqlite"):
        place_database(Path(url.removeprefix("sqlite:///")))
    async with open_store(url, key=b"k" * 32) as store:
        user = User(new_uuid(), "a@b.c", "A", START)
        async with store.write(Turn.ALONE) as tx:
            await tx.users.add(user)
            made = await found_organization(
                tx, "Org", user, sign_up=SignUp(10_000, "enterprise", 5), at=START
            )
        await work(Bench(store, made.organization.id, user.id, made.project.id))  # type: ignore[operator]


STEPS = st.one_of(
    st.tuples(st.just("create"), st.integers(1, 4), st.integers(128, 9000), st.booleans()),
    st.tuples(
        st.just("event"),
        st.integers(0, 5),
        st.sampled_from(
            [
                Event.PAUSE, Event.SAVED, Event.PAUSE_FAILED, Event.RESUME, Event.RESUME_FAILED,
                Event.READY, Event.BROKE, Event.SILENT, Event.DELETE, Event.GONE,
            ]
        ),
        st.integers(1, 2**40),
    ),
    st.tuples(st.just("time"), st.integers(0, 40 * 86_400_000_000)),
    st.tuples(st.just("time"), st.integers(0, 5_000_000)),
    st.tuples(st.just("step back"), st.integers(0, 86_400_000_000)),
    st.tuples(st.just("charge")),
    st.tuples(st.just("restart")),
    st.tuples(st.just("prices"), st.integers(0, 10**8), st.integers(0, 10**8)),
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(STEPS, max_size=40))
@pytest.mark.slow  # random lives find what no one thought of
def test_random_lives_are_charged_exactly(steps: list[tuple[object, ...]]) -> None:
    async def live(bench: Bench) -> None:
        await bench.meter.charge_all()  # the first prices are known
        await bench.create(Shape(1, 512, 1024))
        for kind, *values in steps:
            match kind:
                case "create":
                    vcpus, memory, is_test = values
                    await bench.create(Shape(vcpus, memory, 10240), is_test=is_test)  # type: ignore[arg-type]
                case "event":
                    number, event, size = values
                    life = bench.lives[number % len(bench.lives)]  # type: ignore[operator]
                    saved = {"saved_bytes": size} if event is Event.SAVED else {}
                    await bench.apply(life, event, **saved)  # type: ignore[arg-type]
                case "time":
                    bench.clock.time += timedelta(microseconds=values[0])  # type: ignore[arg-type]
                case "step back":
                    bench.clock.time -= timedelta(microseconds=values[0])  # type: ignore[arg-type]
                case "prices":
                    one, other = values
                    prices = Prices(one, other, 7 * MICROS, other)  # type: ignore[arg-type]
                    await bench.change_prices(prices)
                case "charge":
                    await bench.meter.charge(bench.org_id)
                case _:
                    bench.restart()
        await bench.check()
        for life in bench.lives:
            await bench.apply(life, Event.DELETE)
        await bench.check()

    with tempfile.TemporaryDirectory() as place:
        asyncio.run(with_bench(live, f"sqlite:///{place}/store.db"))


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
async def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/store.db"
        return
    async with postgres_url() as url:
        yield url


async def test_many_who_charge_and_grant_at_once_lose_nothing(store_url: str) -> None:
    """Two processes post usage for the same periods while fifty grants come in, one twice."""

    async def work(bench: Bench) -> None:
        for number in range(5):
            await bench.create(Shape(2, 4096, 10240), is_test=number == 4)
        async with open_store(store_url, key=b"k" * 32) as other:
            twin = Bench(other, bench.org_id, bench.user_id, bench.project_id)
            twin.clock = bench.clock
            twin.restart()

            async def grant(number: int) -> None:
                store = (bench, twin)[number % 2].store
                async with store.write(Turn.ALONE) as tx:
                    await credit(
                        tx, bench.org_id, "grant", 7, description="g", at=bench.clock.now(),
                        reference_id=f"grant-{number % 49}",
                    )  # fmt: skip

            for _ in range(10):
                bench.clock.time += timedelta(minutes=7)
                await asyncio.gather(
                    *(grant(number) for number in range(50)),
                    *(one.meter.charge(bench.org_id) for one in (bench, twin) for _ in range(5)),
                )
        await bench.check()
        async with bench.store.read() as tx:
            account = await tx.credits.account(bench.org_id)
        assert account.granted_cents == 10_000 + 49 * 7

    await with_bench(work, store_url)


async def test_what_the_last_sandbox_used_is_in_the_ledger_soon(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        life = await bench.create(Shape(32, 65536, 10240))
        await bench.meter.charge_all()  # a line in the ledger is due again in five minutes
        bench.clock.time += timedelta(minutes=4)
        await bench.apply(life, Event.DELETE)
        await bench.meter.charge_all()
        async with bench.store.read() as tx:
            account = await tx.credits.account(bench.org_id)
            owing = await tx.usage.owing()
        assert owing == []
        assert 0 <= account.carried < MICROS
        assert account.balance_cents == 10_000 - life.cost(bench.clock.now()) // MICROS

    await with_bench(work, f"sqlite:///{tmp_path}/store.db")


async def test_a_clock_set_back_takes_back_what_was_charged_too_early(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        life = await bench.create(Shape(32, 65536, 10240))
        bench.clock.time += timedelta(hours=5)
        await bench.check()
        bench.clock.time -= timedelta(hours=4)
        await bench.apply(life, Event.DELETE)
        await bench.check()
        async with bench.store.read() as tx:
            newest = (await tx.credits.history(bench.org_id, limit=1))[0]
        assert newest.type == "adjustment"
        assert newest.amount_cents > 0

    await with_bench(work, f"sqlite:///{tmp_path}/store.db")


async def test_prices_that_change_while_sandboxes_run_hold_from_then_on(store_url: str) -> None:
    async def work(bench: Bench) -> None:
        await bench.meter.charge_all()
        lives = [await bench.create(Shape(2, 4096, 10240)) for _ in range(30)]
        for life in lives[:10]:
            await bench.apply(life, Event.PAUSE)
            await bench.apply(life, Event.SAVED, saved_bytes=2**40)
        for factor in (100, 1, 3):
            bench.clock.time += timedelta(hours=9, microseconds=7)
            prices = Prices(*(factor * one for one in vars(PRICES).values()))
            await bench.change_prices(prices)
            await bench.check()
        await bench.apply(lives[20], Event.DELETE)
        bench.clock.time += timedelta(hours=1)
        await bench.check()
        # An estimate for an admission counts nothing twice either.
        async with bench.store.read() as tx:
            used = await tx.usage.in_use(bench.org_id, bench.clock.now())
            periods = await tx.usage.unsettled(bench.org_id)
        owed = bench.prices.latest.used(used.owed) - used.posted
        assert abs(owed - sum(
            bench.prices.compute(one.shape, one.started_at, bench.clock.now()) - one.posted
            for one in periods if not one.is_free
        )) < MICROS  # fmt: skip

    await with_bench(work, store_url)


async def test_servers_of_different_prices_charge_nothing_until_they_agree(
    store_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(bench: Bench) -> None:
        await bench.meter.charge_all()
        await bench.create(Shape(2, 4096, 10240))
        async with open_store(store_url, key=b"k" * 32) as other:
            twin = Bench(other, bench.org_id, bench.user_id, bench.project_id)
            twin.clock, twin.server_id = bench.clock, "twin"
            dear = Prices(*(9 * one for one in vars(PRICES).values()))
            twin.changes.append((START, dear))
            twin.restart()
            await twin.meter.charge_all()
            # Each is at work, and says so.
            for one in (bench, twin) * 40:
                bench.clock.time += timedelta(seconds=10)
                await one.meter.charge_all()
            async with bench.store.read() as tx:
                assert (await tx.credits.account(bench.org_id)).used_cents == 0
                assert await tx.prices.history() == PriceList(((FIRST, PRICES),))
            assert "other servers have other prices: server" in caplog.text
            # The first one is stopped, or has the other's prices now.
            bench.clock.time += timedelta(minutes=1)
            async with bench.store.write(Turn.SHARED) as tx:  # and its lease ends
                assert await tx.duties.take("meter", bench.server_id, lasts=-timedelta(seconds=1))
            await twin.meter.charge_all()
            bench.changes.append((bench.clock.now(), dear))
            await bench.learn_prices()
            assert bench.changes[0][0] > START + timedelta(minutes=1)
        bench.clock.time += timedelta(minutes=1)
        bench.restart()
        await bench.check()

    await with_bench(work, store_url)


async def test_an_organization_with_very_many_periods_is_charged(store_url: str) -> None:
    async def work(bench: Bench) -> None:
        start, day, count = bench.clock.now(), timedelta(days=1), 1700
        async with bench.store.write(Turn.ALONE) as tx:
            for number in range(count):
                await tx.storage.open(StoragePeriod("x", f"{number}", bench.org_id, 2**34, start))
                if number % 17:
                    await tx.storage.close("x", f"{number}", start + day)
        bench.clock.time = start + 2 * day
        await bench.meter.charge(bench.org_id)
        async with bench.store.read() as tx:
            account = await tx.credits.account(bench.org_id)
            left = await tx.storage.unsettled(bench.org_id)
        assert len(left) == count // 17
        ended = (count - len(left)) * PRICES.storage(2**34, day)
        assert account.used_cents * MICROS + account.carried == ended + sum(
            one.posted for one in left
        )

    await with_bench(work, store_url)


async def test_what_had_ended_before_prices_changed_is_paid_back_to_its_end(store_url: str) -> None:
    """As when a host went down, and the server starts again with other prices."""

    async def work(bench: Bench) -> None:
        await bench.meter.charge_all()
        life = await bench.create(Shape(2, 4096, 10240))
        bench.clock.time += timedelta(hours=1)
        end = bench.clock.now()
        for factor in (3, 5):
            bench.clock.time += timedelta(hours=9)
            await bench.change_prices(Prices(*(factor * one for one in vars(PRICES).values())))
        await bench.meter.charge(bench.org_id)
        await bench.apply(life, Event.BROKE, ended_at=end)
        life.computes = [(life.computes[0][0], end)]
        await bench.check()
        async with bench.store.read() as tx:
            used = await tx.usage.in_use(bench.org_id, bench.clock.now())
            assert used == await recounted(tx, bench.org_id, bench.clock.now())

    await with_bench(work, store_url)


async def test_prices_of_a_clock_that_was_ahead_hold_once_it_is_right(store_url: str) -> None:
    async def work(bench: Bench) -> None:
        await bench.meter.charge_all()
        dear = Prices(*(9 * one for one in vars(PRICES).values()))
        right = bench.clock.time
        bench.clock.time += timedelta(days=400)
        async with bench.store.write(Turn.SHARED) as tx:
            await tx.prices.note("gone", PRICES, bench.clock.now())
        bench.changes.append((bench.clock.now(), dear))
        bench.restart()
        bench.clock.time += timedelta(minutes=1)
        await bench.meter.charge_all()
        bench.clock.time = right + timedelta(minutes=1)
        bench.restart()
        await bench.meter.charge_all()
        await bench.learn_prices()
        assert bench.changes[0][0] < right + timedelta(minutes=2)
        await bench.create(Shape(2, 4096, 10240))
        bench.clock.time += timedelta(hours=3)
        await bench.check()

    await with_bench(work, store_url)
