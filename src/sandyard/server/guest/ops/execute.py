"""EXEC: runs a command line, carries its streams and reports its end: START and ATTACH in one.

The command ends with its connection. Only a machine that was suspended, whose connections were all
reset, lets it continue.
"""

import socket

from sandyard.server.core import ops, wire
from sandyard.server.guest.context import Context
from sandyard.server.guest.ops.processes import hear_end, hear_input, start, tell
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
        await answer(connection, ops.Started(entry.started.pid), again=again)
        hear = hear_input if wish.stdin else hear_end
        if not await tell(entry, follower, connection, hear(entry, connection, decoder)):
            await entry.stop()  # the client that waited for the result is gone
