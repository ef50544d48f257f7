"""The ways into sandboxes: preview URLs, SSH, terminals for browsers."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request, WebSocket

from sandyard.server.api.access import Scope, socket_scope, takes_ticket
from sandyard.server.api.models.base import Data
from sandyard.server.api.models.processes import end_out
from sandyard.server.api.models.ways import (
    NewTerminal,
    SizeMessage,
    SshOut,
    TerminalOut,
    UrlOut,
    typed,
)
from sandyard.server.api.routes.common import Keyed, enveloped, errors, provided
from sandyard.server.api.sockets import Inflow, messages_of, send_json, served, watched
from sandyard.server.core.errors import InvalidArgumentError, SandyardError, UnavailableError
from sandyard.server.core.ids import checked_text
from sandyard.server.core.ops import Ended, Size
from sandyard.server.service.actor import Actor, Admission
from sandyard.server.service.addresses import Addresses
from sandyard.server.service.people.rates import Rates
from sandyard.server.service.sandboxes.change import Sandboxes
from sandyard.server.service.sandboxes.previews import Previews
from sandyard.server.service.sandboxes.processes import Following
from sandyard.server.service.sandboxes.terminals import FIRST_SIZE, Terminals
from sandyard.server.tasks import concurrently

router = APIRouter(tags=["ways in"])

CanWrite = Annotated[Actor, Depends(Scope("sandbox:write"))]


@router.get("/v1/sandboxes/{reference}/url", responses=errors(404))
async def get_url(
    request: Request,
    actor: CanWrite,
    previews: Annotated[Previews, provided("previews")],
    reference: str,
    port: Annotated[int, Query(ge=1, le=65535, description="What listens there is shown.")],
    access: Annotated[
        Literal["host", "cookie"],
        Query(description="Where the token is: in the host name, or for a browser in a cookie."),
    ] = "host",
    ttl: Annotated[
        int | None,
        Query(
            ge=60,
            le=30 * 86_400,
            description="Seconds that it holds at least; the setting preview.token_s without.",
        ),
    ] = None,
) -> Data[UrlOut]:
    """Return a preview URL of a port. Anyone who has the URL can use it until it expires."""
    found = await previews.url(
        actor,
        checked_text(reference, field="reference"),
        port,
        by_cookie=access == "cookie",
        lasts_s=ttl,
    )
    return enveloped(request, UrlOut(url=found.url, port=found.port, expires_at=found.expires_at))


@router.get("/v1/sandboxes/{reference}/ssh", responses=errors(404))
async def get_ssh(
    request: Request,
    actor: CanWrite,
    service: Annotated[Sandboxes, provided("sandboxes")],
    addresses: Annotated[Addresses, provided("addresses")],
    reference: str,
) -> Data[SshOut]:
    """Return how to log in to a sandbox by SSH."""
    sandbox = await service.get(
        actor, checked_text(reference, field="reference"), scope="sandbox:write"
    )
    where = addresses.ssh
    if where is None:
        raise UnavailableError(
            "cannot log in by SSH: the gateway is switched off here; set ssh.enabled"
        )
    port = "" if where.port == 22 else f"-p {where.port} "
    return enveloped(
        request,
        SshOut(
            host=where.host,
            port=where.port,
            user=sandbox.id,
            command=f"ssh {port}{sandbox.id}@{where.host}",
            key_id=next((one for one in sandbox.ssh_key_ids if one), None),
            host_key=where.host_key,
            known_hosts=where.known_hosts,
        ),
    )


@router.post("/v1/terminal/sandbox-sessions", status_code=201, responses=errors(404))
async def open_terminal(
    request: Request,
    actor: CanWrite,
    terminals: Annotated[Terminals, provided("terminals")],
    body: NewTerminal,
    keyed: Keyed,
) -> Data[TerminalOut]:
    """Create a ticket that opens a terminal in a sandbox, once, within a minute."""
    reference = checked_text(body.sandbox_id, field="sandboxId")
    made = await terminals.issue(actor, reference, body.terminal_id, request=keyed)
    return enveloped(
        request,
        TerminalOut(
            session_id=made.secret,
            sandbox_id=made.sandbox_id,
            ws_path=f"/v1/terminal/sessions/{made.secret}",
            expires_at=made.expires_at,
            terminal_id=made.name,
        ),
    )


@router.get("/v1/terminal/sessions/{session}", include_in_schema=False)
async def terminal_by_request(actor: CanWrite, session: str) -> None:
    """Refuse a plain request: this is a WebSocket."""
    del actor, session
    raise InvalidArgumentError("cannot open a terminal by a plain request: use a WebSocket")


@router.websocket("/v1/terminal/sessions/{session}")
@takes_ticket("terminal")
@socket_scope("sandbox:write")
async def terminal(
    socket: WebSocket,
    terminals: Annotated[Terminals, provided("terminals")],
    rates: Annotated[Rates, provided("rates")],
    session: str,
) -> None:
    """Connect to a terminal.

    Sent by the client: keys, as bytes or text, and messages `input` and `resize`. Sent to the
    client: output as bytes, and finally a message `exit`. If the requested `offset` is no longer
    kept, a message `offset` says where the output resumes.
    """
    del session  # the edge has redeemed it
    async with served(socket):
        admission: Admission = socket.state.admission
        size = Size(
            _side(socket, "cols", FIRST_SIZE.columns), _side(socket, "rows", FIRST_SIZE.rows)
        )
        offset = _number(socket, "offset")
        async with terminals.open(admission, size, offset) as following:
            await socket.accept()
            if offset is not None and offset != following.offset:
                # What was printed before is not kept any more.
                await send_json(socket, {"type": "offset", "offset": following.offset})
            inflow = Inflow(following)
            resizing = _Resizing(terminals, rates, admission, following)

            async def still_alive() -> None:
                await socket.send_bytes(b"")

            async with (
                concurrently(_hear(socket, inflow, resizing)),
                concurrently(inflow.pass_on()),
                concurrently(watched(socket, lambda: terminals.check(admission), still_alive)),
            ):
                await _show(following, socket)


async def _show(following: Following, socket: WebSocket) -> None:
    """Send what is printed and how it ended, and close."""
    async for one in following.events():
        if isinstance(one, Ended):
            await send_json(socket, {"type": "exit", **end_out(one)})
            await socket.close()
            return
        await socket.send_bytes(one.data)


async def _hear(socket: WebSocket, inflow: Inflow, resizing: "_Resizing") -> None:
    async for message in messages_of(socket):
        wish = message if isinstance(message, bytes) else typed(message)
        if isinstance(wish, SizeMessage):
            await resizing.ask(wish.size())
        else:
            await inflow.take(wish)


class _Resizing:
    """Gives the terminal the size that its window has, each of them counted as a request."""

    def __init__(
        self, terminals: Terminals, rates: Rates, admission: Admission, following: Following
    ) -> None:
        self._terminals = terminals
        self._rates = rates
        self._admission = admission
        self._pid = following.pid

    async def ask(self, size: Size) -> None:
        """Give it a size; what goes wrong with that is no reason to close the terminal."""
        try:
            self._rates.count(self._admission.actor)
            await self._terminals.resize(self._admission, self._pid, size)
        except SandyardError:
            return


def _number(socket: WebSocket, name: str) -> int | None:
    text = socket.query_params.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise InvalidArgumentError(f"cannot use {name}: it is a number", field=name)
    return int(text)


def _side(socket: WebSocket, name: str, default: int) -> int:
    found = _number(socket, name)
    if found is not None and not 1 <= found <= 65535:
        raise InvalidArgumentError(f"cannot use {name}: it is 1 to 65535", field=name)
    return default if found is None else found
