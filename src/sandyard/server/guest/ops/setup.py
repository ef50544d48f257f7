"""SETUP and WAKE: gives the machine its identity, and renews what is outdated after a
suspension."""

import contextlib
import os
import socket

from sandyard.server.core import ops
from sandyard.server.guest import connections, system
from sandyard.server.guest.authorities import add_authority
from sandyard.server.guest.context import Context
from sandyard.server.guest.ops.mount import leave_mounts
from sandyard.server.guest.system import RefusedError


def wake(context: Context, wish: ops.Wake, connection: socket.socket) -> None:
    """See core.ops.Wake; raises if any of it cannot be."""
    system.reseed(wish.entropy)
    system.set_clock(wish.wall_ns)
    if not wish.keeps_connections:
        connections.break_off(
            own_port=connection.getsockname()[1], peer_port=connection.getpeername()[1]
        )
    context.load.forget()


async def trust(context: Context, wish: ops.Trust) -> None:
    """See core.ops.Trust."""
    own_root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        system.enter(context.root_fd)
        add_authority(wish.certificate, wish.name_hash)
    except OSError as error:
        raise RefusedError(
            f"cannot add the certificate of the network's authority: {error}"
        ) from error
    finally:
        system.enter(own_root)
        os.close(own_root)
    await context.login_environment(system.find_account(context.root_fd, "root"))


async def set_up(context: Context, wish: ops.SetUp, connection: socket.socket) -> None:
    """See core.ops.SetUp."""
    context.history.samples.clear()  # those of a machine that this one was cloned from
    if (waking := wish.waking) is not None:
        wake(context, waking, connection)
    if wish.disk_bytes is not None:
        # First, because a full disk has room for the rest after that.
        system.grow_disk(wish.disk_bytes, context.root_fd)
    socket.sethostname(wish.hostname)
    if wish.machine_id is not None:
        system.write_boot_id()
        # Mounts of the machine it was cloned from belong to that machine.
        await leave_mounts(context)
    own_root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        system.enter(context.root_fd)
        system.write_identity(
            hostname=wish.hostname,
            machine_id=wish.machine_id,
            authorized_keys=wish.authorized_keys,
            password_hash=wish.password_hash,
            replaces_access=wish.replaces_access,
        )
        if wish.trust is not None:
            with contextlib.suppress(OSError):  # a sandbox must start whatever is on its disk
                add_authority(wish.trust.certificate, wish.trust.name_hash)
    except OSError as error:
        raise RefusedError(f"cannot write the identity of the sandbox: {error}") from error
    finally:
        system.enter(own_root)
        os.close(own_root)
    env = system.checked_environment(wish.env)
    context.remember(token=wish.token, env=env, pace=wish.pace)
    await context.login_environment(system.find_account(context.root_fd, "root"))
