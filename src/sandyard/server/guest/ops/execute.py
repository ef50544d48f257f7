"""EXEC: runs a command line, carries its streams and reports its end: START and ATTACH in one."""

import socket

from sandyard.server.core import ops, wire
from sandyard.server.guest.context import Context
from sandyard.server.guest.ops.processes import start, tell
from sandyard.server.guest.streams import answer


async def execute(
    context: Context,
    wish: ops.Execute,
    connection: socket.socket,
    decoder: wire.Decoder,
    *,
    again: bool,
) -> None:
    """See core.ops.Execute."""
    entry = await start(
        context,
        ops.Start(
            command=wish.command,
            cwd=wish.cwd,
            env=wish.env,
            user=wish.user,
            stdin=wish.stdin,
            timeout_ms=wish.timeout_ms,
        ),
        connection,
        is_kept=False,
    )
    with entry.followed(0) as follower:
        await answer(connection, ops.Started(entry.told.pid), again=again)
        # Without a stdin the host sends nothing more. A host that disconnects does not end the
        # command, whose limit is enforced here.
        await tell(entry, follower, connection, decoder, listens=wish.stdin)
