"""Starts a machine: boots it until its agent answers, or restores it in a suspended state."""

import asyncio
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass

from sandyard.server.core.errors import (
    ConflictError,
    DeadlineExceededError,
    IncompatibleError,
    InternalError,
    UnavailableError,
)
from sandyard.server.core.ops import Hello
from sandyard.server.drivers.background import Entry
from sandyard.server.drivers.contract import (
    Driver,
    Machine,
    MachineSpec,
    Place,
    Saved,
    SavingDriver,
    SavingMachine,
)
from sandyard.server.drivers.processes import starved_s
from sandyard.server.node.agent import AgentLink
from sandyard.server.node.images.image import Image
from sandyard.server.node.machines.body import Body
from sandyard.server.node.machines.means import Means
from sandyard.server.node.machines.records import Record
from sandyard.server.node.machines.watch import end_of
from sandyard.server.tasks import concurrently, in_thread

_HELLO_S, _DIAL_S = 10.0, 0.2
_LOOK_S = 1.0


@dataclass(frozen=True)
class Kit:
    """What a machine is started with: its image, and the driver that its record names."""

    image: Image
    driver: Driver

    @property
    def saver(self) -> SavingDriver:
        """The driver, which can save machines.

        Raises:
            UnavailableError: it cannot.
        """
        if not self.driver.capabilities.saves:
            raise UnavailableError(f"cannot restore a machine with {self.driver.name}")
        saver: SavingDriver = self.driver  # type: ignore[assignment]  # as it says of itself
        return saver


def kit_of(record: Record, means: Means) -> Kit:
    """Return the image and driver of a record's machine.

    Raises:
        UnavailableError: one of them is missing.
    """
    image, driver = means.images.find(record.image), means.drivers.named(record.driver)
    if image is None or driver is None:
        raise UnavailableError(
            f"cannot start the machine: its {'image' if driver else 'driver'} is not here"
        )
    return Kit(image, driver)


async def spec_of(
    record: Record, body: Body, kit: Kit, place: Place, *, background: Entry | None
) -> MachineSpec:
    """Return the specification for the driver, and lend the body to the account of the place."""
    await in_thread(body.lend_to, place)
    return MachineSpec(
        name=record.id,
        vcpus=record.vcpus,
        memory_mib=record.memory_mib,
        kernel=kit.image.kernel,
        initrd=kit.image.initrd,
        roots=kit.image.roots,
        disk=body.disk,
        memory=body.memory,
        folder=body.run,
        place=place,
        token=record.token,
        has_acpi=kit.image.has_acpi,
        arguments=kit.image.arguments,
        background=background,
    )


async def restored(
    kit: Kit, spec: MachineSpec, body: Body, version: str, held: AsyncExitStack
) -> SavingMachine:
    """Return a restored machine, which is still suspended. `version` is the hypervisor's that saved
    it.

    Raises:
        IncompatibleError: the hypervisor refuses the saved state.
        InternalError, UnavailableError: it could not be started.
    """
    try:
        return await kit.saver.restore(spec, Saved(body.saved, version), held)
    except ConflictError as error:
        raise IncompatibleError(f"{error.message}; a restart boots it from its disk") from error


async def _starved_s(machine: Machine) -> float:
    """Return how many seconds a machine has waited for a busy CPU."""
    pid = int(machine.handle.get("pid", 0))
    return await in_thread(starved_s, pid) if pid else 0.0


async def use_up(machine: Machine, limit_s: float, means: Means) -> None:
    """Return after `limit_s`, not counting the time in which the machine waited for a busy CPU.
    Return after ten times the limit in any case."""
    clock = means.clock
    began, before = clock.monotonic(), await _starved_s(machine)
    while True:
        wall_s = clock.monotonic() - began
        starved = min(await _starved_s(machine) - before, 0.9 * wall_s)
        if wall_s - starved >= limit_s:
            return
        await clock.sleep(min(limit_s, _LOOK_S))


async def await_agent(machine: Machine, link: AgentLink, body: Body, means: Means) -> None:
    """Return once the agent of a booting machine answers.

    Time in which the machine waits for a busy CPU does not count, up to ten times the limits: on an
    overloaded host that is most of the time.

    Raises:
        DeadlineExceededError: the guest makes no progress, or a limit is exceeded.
        InternalError: the machine ended.
    """
    clock, limits = means.clock, means.limits
    hello_s, dial_s = means.patience(_HELLO_S), means.patience(_DIAL_S)
    boot_s, no_progress_s = means.patience(limits.boot_s), means.patience(limits.no_progress_s)
    began = started = progressed = clock.monotonic()
    async with concurrently(end_of(machine)) as ending:
        while True:
            with suppress(UnavailableError):
                async with concurrently(
                    link.ask(Hello(), limit_s=hello_s, dial_s=dial_s)
                ) as asking:
                    # A guest that ends during this does not answer.
                    await asyncio.wait([asking, ending], return_when=asyncio.FIRST_COMPLETED)
                    if asking.done():
                        asking.result()
                        return
            await machine.stall()  # only this call shows that its hypervisor has given up
            output = await machine.console()
            body.append_console(output)
            wall = clock.monotonic()
            now = wall - min(await _starved_s(machine), 0.9 * (wall - began))
            progressed = now if output else progressed
            if ending.done():
                message = ending.result().message
                raise InternalError(f"the machine ended while it started: {message}")
            if now - progressed > no_progress_s:
                raise DeadlineExceededError(f"the machine made no progress for {no_progress_s:g} s")
            if now - started > boot_s:
                raise DeadlineExceededError(f"the agent did not answer within {boot_s:g} s")
            await clock.sleep(limits.poll_s)
