"""Desktops: a page for people, and a screen, a pointer and a keyboard for agents."""

import asyncio
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, Request, Response, WebSocket

from sandyard.server.api.access import Scope, socket_scope, takes_ticket
from sandyard.server.api.models.base import Data, Page
from sandyard.server.api.models.desktops import (
    Click,
    DoneOut,
    Drag,
    PlaceIn,
    PressKeys,
    Scroll,
    TypeText,
    VncOut,
    WindowOut,
    window_out,
)
from sandyard.server.api.routes.common import Where, enveloped, errors, provided, whole
from sandyard.server.api.sockets import messages_of, served, watched
from sandyard.server.core.contracts.node import ByteStream
from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.ids import checked_text
from sandyard.server.front.bodies import takes_body
from sandyard.server.service.actor import Actor, Admission
from sandyard.server.service.sandboxes.desktops import Desktops, Point
from sandyard.server.tasks import concurrently

router = APIRouter(tags=["desktops"])

_HERE = "/v1/sandboxes/{reference}/desktop"
_PIECE = 64 * 1024
_TEXT_BODY = 256 * 1024  # the longest text, with what JSON makes of it

CanWrite = Annotated[Actor, Depends(Scope("sandbox:write"))]
Service = Annotated[Desktops, provided("desktops")]


@router.get("/v1/sandboxes/{reference}/vnc", responses=errors(404, 409))
async def get_vnc(
    request: Request, actor: CanWrite, service: Service, where: Where, reference: str
) -> Data[VncOut]:
    """Return a one-time URL of a page that shows the sandbox's desktop."""
    made = await service.issue(actor, checked_text(reference, field="reference"))
    base = urlsplit(where.base_url)
    return enveloped(
        request,
        VncOut(
            # After the #, which a browser does not send.
            url=f"{where.desktop_url(made.sandbox_id)}#ticket={made.secret}",
            expires_at=made.expires_at,
            host=base.hostname or "",
            port=base.port or (443 if base.scheme == "https" else 80),
        ),
    )


@router.get("/v1/desktop/sessions/{session}", include_in_schema=False)
async def desktop_by_request(actor: CanWrite, session: str) -> None:
    """Refuse a plain request: this is a WebSocket."""
    del actor, session
    raise InvalidArgumentError("cannot open a desktop by a plain request: use a WebSocket")


@router.websocket("/v1/desktop/sessions/{session}")
@takes_ticket("desktop")
@socket_scope("sandbox:write")
async def desktop(socket: WebSocket, service: Service, session: str) -> None:
    """Connect to a desktop. Binary messages carry RFB in both directions."""
    del session  # the edge has redeemed it
    async with served(socket):
        admission: Admission = socket.state.admission
        async with service.open(admission) as screen:
            await socket.accept("binary" if "binary" in socket.scope["subprotocols"] else None)

            async def still_alive() -> None:
                await asyncio.sleep(0)  # a screen has no words for that; the kernel finds out

            async with (
                concurrently(_hear(socket, screen)),
                concurrently(watched(socket, lambda: service.check(admission), still_alive)),
            ):
                while data := await screen.read(_PIECE):
                    await socket.send_bytes(data)
            await socket.close()


async def _hear(socket: WebSocket, screen: ByteStream) -> None:
    async for message in messages_of(socket):
        await screen.write(message if isinstance(message, bytes) else message.encode())


@router.get(
    f"{_HERE}/screenshot",
    responses={
        **errors(402, 404, 409),
        200: {"description": "A picture.", "content": {"image/png": {}}},
    },
    response_class=Response,
)
async def take_screenshot(actor: CanWrite, service: Service, reference: str) -> Response:
    """Return a screenshot as PNG."""
    png = await service.screenshot(actor, checked_text(reference, field="reference"))
    return Response(png, media_type="image/png", headers={"Cache-Control": "no-store"})


@router.post(f"{_HERE}/click", responses=errors(402, 404, 409))
async def click(
    request: Request, actor: CanWrite, service: Service, reference: str, body: Click
) -> Data[DoneOut]:
    """Click at a point of the screen."""
    reference = checked_text(reference, field="reference")
    await service.click(actor, reference, body.place(), body.button, body.count)
    return enveloped(request, DoneOut())


@router.post(f"{_HERE}/move", responses=errors(402, 404, 409))
async def move(
    request: Request, actor: CanWrite, service: Service, reference: str, body: PlaceIn
) -> Data[DoneOut]:
    """Move the pointer to a point of the screen."""
    await service.move(actor, checked_text(reference, field="reference"), body.place())
    return enveloped(request, DoneOut())


@router.post(f"{_HERE}/drag", responses=errors(402, 404, 409))
async def drag(
    request: Request, actor: CanWrite, service: Service, reference: str, body: Drag
) -> Data[DoneOut]:
    """Press a button at one point, and release it at another."""
    source, target = Point(body.from_x, body.from_y), Point(body.to_x, body.to_y)
    reference = checked_text(reference, field="reference")
    await service.drag(actor, reference, source, target, body.button)
    return enveloped(request, DoneOut())


@router.post(f"{_HERE}/scroll", responses=errors(402, 404, 409))
async def scroll(
    request: Request, actor: CanWrite, service: Service, reference: str, body: Scroll
) -> Data[DoneOut]:
    """Scroll at a point of the screen."""
    reference = checked_text(reference, field="reference")
    await service.scroll(actor, reference, body.place(), body.dx, body.dy)
    return enveloped(request, DoneOut())


@router.post(f"{_HERE}/type", responses=errors(402, 404, 409))
@takes_body(_TEXT_BODY)
async def type_text(
    request: Request, actor: CanWrite, service: Service, reference: str, body: TypeText
) -> Data[DoneOut]:
    """Type text into the focused window."""
    await service.type(actor, checked_text(reference, field="reference"), body.text)
    return enveloped(request, DoneOut())


@router.post(f"{_HERE}/key", responses=errors(402, 404, 409))
async def press_keys(
    request: Request, actor: CanWrite, service: Service, reference: str, body: PressKeys
) -> Data[DoneOut]:
    """Press a combination of keys, such as `Return` or `ctrl+shift+t`."""
    await service.press(actor, checked_text(reference, field="reference"), body.keys)
    return enveloped(request, DoneOut())


@router.get(f"{_HERE}/windows", responses=errors(402, 404, 409))
async def list_windows(
    request: Request, actor: CanWrite, service: Service, reference: str
) -> Page[WindowOut]:
    """List the windows on the screen, oldest first."""
    found = await service.windows(actor, checked_text(reference, field="reference"))
    return whole(request, [window_out(one) for one in found])
