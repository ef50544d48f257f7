"""Commands in sandboxes."""

import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from starlette.types import Receive, Send
from starlette.types import Scope as Connection
from typing_extensions import override

from sandyard.server.api.access import Scope
from sandyard.server.api.models.base import Data, Meta
from sandyard.server.api.models.commands import Exec, ExecOut, exec_out, pieces_of_answer
from sandyard.server.api.routes.common import enveloped, errors, provided
from sandyard.server.core.ids import checked_text
from sandyard.server.front.bodies import takes_body
from sandyard.server.front.streams import while_connected
from sandyard.server.service.actor import Actor
from sandyard.server.service.sandboxes.execute import CommandOutcome, Commands
from sandyard.server.tasks import in_thread

_LARGE = 256 * 1024
_BODY_MAX = 24 * 1024 * 1024  # 16 MiB of stdin in base64, and a command


class _LargeRequest(Request):
    @override
    async def json(self) -> Any:
        """Return the body's value; a large one is made into it in a thread."""
        body = await self.body()
        return json.loads(body) if len(body) < _LARGE else await in_thread(json.loads, body)


class _LargeRoute(APIRoute):
    @override
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_large(request: Request) -> Response:
            return await handle(_LargeRequest(request.scope, request.receive))

        return handle_large


class _LargeAnswer(StreamingResponse):
    """Sends what a command printed in small pieces, and gives its memory back however it ends."""

    def __init__(self, outcome: CommandOutcome, encoding: str, meta: Meta) -> None:
        self._outcome = outcome

        async def pieces() -> AsyncIterator[bytes]:
            for piece in pieces_of_answer(outcome, encoding, meta):
                yield piece

        super().__init__(pieces(), media_type="application/json")

    @override
    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Send the answer."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._outcome.release()


router = APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"], route_class=_LargeRoute)


CanWrite = Annotated[Actor, Depends(Scope("sandbox:write"))]


Service = Annotated[Commands, provided("commands")]


@router.post(
    "/{reference}/exec", responses=errors(402, 404, 409, 413), response_model=Data[ExecOut]
)
@takes_body(_BODY_MAX)
async def execute(
    request: Request, actor: CanWrite, service: Service, reference: str, body: Exec
) -> Any:
    """Run a command and return its output. A non-zero exit code is not an error. If the client
    disconnects, the command is ended with everything that it started."""
    checked_text(reference, field="reference")
    async with while_connected(request):
        outcome = await service.execute(actor, reference, body.wish())
    if len(outcome.stdout) + len(outcome.stderr) < _LARGE:
        outcome.release()
        return enveloped(request, exec_out(outcome, body.encoding))
    return _LargeAnswer(outcome, body.encoding, Meta(request_id=request.state.request_id))
