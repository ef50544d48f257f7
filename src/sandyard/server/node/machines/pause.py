"""Writes the state of a suspended machine: to its own body when it is paused, or as a copy."""

import shutil
from dataclasses import replace
from pathlib import Path

from sandyard.server.core.errors import InternalError, NoCapacityError, SandyardError
from sandyard.server.drivers.contract import Saved, SavingMachine
from sandyard.server.node.machines import saved as saving
from sandyard.server.node.machines.body import Body
from sandyard.server.node.machines.means import Means
from sandyard.server.node.machines.records import Record
from sandyard.server.node.machines.saved import About, SavedMachine
from sandyard.server.node.machines.start import Kit
from sandyard.server.tasks import in_thread

_FULL = (28, 122)  # ENOSPC, EDQUOT


def about(record: Record, means: Means, *, kind: str, version: str) -> About:
    """Return the description of a saved state of a record's machine. `version` is the hypervisor's
    that wrote it."""
    return About(
        kind=kind,
        template=record.template,
        image=record.image,
        os=record.os,
        vcpus=record.vcpus,
        memory_mib=record.memory_mib,
        disk_mib=record.disk_mib,
        driver=record.driver,
        driver_version=version,
        host=means.seals.host,
        token=record.token,
    )


async def write_own(machine: SavingMachine, record: Record, body: Body, means: Means) -> None:
    """Write the state of a suspended machine to its own body, and publish it.

    Raises:
        NoCapacityError: the host's disk is full.
        UnavailableError, InternalError: it cannot be saved now.
    """
    await body.drop_unpublished()
    try:
        state = await machine.save(body.saving)
        own = about(record, means, kind="paused", version=state.version)
        await means.seals.seal(state.folder, own, belonging=(body.disk, body.memory))
        await body.publish()
    except OSError as error:
        raise translated(error) from error


async def write_copy(
    machine: SavingMachine | None, part: Path, record: Record, body: Body, means: Means
) -> str:
    """Write state and disk of a suspended machine to a new folder, and return the version of the
    hypervisor that wrote it. Without `machine` it is paused, and its saved state is copied.

    Raises: see `write_own`; DamagedError if the saved state was altered.
    """
    if machine is None:
        state = means.seals.load(body.saved)
        # It is sealed again, so it must be what was sealed before.
        await means.seals.check(state, whole=True)
        await in_thread(saving.copy_state, state, part)
        version = state.about.driver_version
    else:
        version = (await machine.save(part)).version
    await means.disks.copy(body.disk, part / "disk.ext4")
    return version


async def finish_copy(
    part: Path,
    folder: Path,
    record: Record,
    body: Body,
    means: Means,
    kit: Kit,
    *,
    kind: str,
    version: str,
) -> SavedMachine:
    """Complete a copy so that it depends on nothing else, seal and publish it. The machine may
    run."""
    await kit.saver.make_whole(Saved(part, version), body.memory)
    made = await means.seals.seal(part, about(record, means, kind=kind, version=version))
    await in_thread(saving.publish, part, folder)
    return replace(made, folder=folder)


async def begin_copy(folder: Path) -> Path:
    """Return the folder for an unfinished copy; what an earlier attempt left is removed."""
    part = folder.with_name(folder.name + ".part")
    await in_thread(shutil.rmtree, part, ignore_errors=True)
    part.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return part


def translated(error: OSError) -> SandyardError:
    """Return the typed error for a failure of the host's disk during a save."""
    if error.errno in _FULL:
        return NoCapacityError("cannot save the machine: the host's disk is full; free some space")
    return InternalError(f"cannot save the machine: {error}")
