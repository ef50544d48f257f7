"""Contexts: interpreters that keep what earlier code defined."""

import codecs
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from sandyard.server.api.access import Scope
from sandyard.server.api.events import EventStream, Recheck, SseEvent, rechecked
from sandyard.server.api.models.base import Data, Page, RemovedOut
from sandyard.server.api.models.contexts import (
    ContextOut,
    InterruptedOut,
    NewContext,
    RunCode,
    code_error_out,
    context_out,
    result_out,
)
from sandyard.server.api.routes.common import Keyed, enveloped, errors, provided, whole
from sandyard.server.core.ids import checked_text
from sandyard.server.front.bodies import takes_body
from sandyard.server.service.actor import Actor
from sandyard.server.service.sandboxes.contexts import Contexts
from sandyard.server.service.sandboxes.reports import STREAMS, Finished, Report, Result, Text

router = APIRouter(prefix="/v1/sandboxes/{reference}/contexts", tags=["contexts"])

_BODY_MAX = 4 * 1024 * 1024  # 1 MiB of code and as much of input, and what JSON makes of them

CanWrite = Annotated[Actor, Depends(Scope("sandbox:write"))]
Service = Annotated[Contexts, provided("contexts")]
MayFollow = Annotated[Recheck, rechecked("sandbox:write")]


async def _reference(reference: str) -> str:
    return checked_text(reference, field="reference")


async def _context(context: str) -> str:
    return checked_text(context, field="context")


Where = Annotated[str, Depends(_reference)]
Which = Annotated[str, Depends(_context)]


@router.post("", status_code=201, responses=errors(402, 404, 409))
async def create_context(
    request: Request,
    actor: CanWrite,
    service: Service,
    reference: Where,
    body: NewContext,
    keyed: Keyed,
) -> Data[ContextOut]:
    """Create a context. It lives in the sandbox until it is deleted or the sandbox restarts, also
    while the sandbox is paused."""
    made = await service.create(
        actor, reference, body.language, cwd=body.cwd, user=body.user, request=keyed
    )
    return enveloped(request, context_out(made))


@router.get("", responses=errors(404, 409))
async def list_contexts(
    request: Request, actor: CanWrite, service: Service, reference: Where
) -> Page[ContextOut]:
    """List the contexts of a sandbox, oldest first, whichever client created them."""
    return whole(request, [context_out(one) for one in await service.list(actor, reference)])


@router.get("/{context}", responses=errors(404, 409))
async def get_context(
    request: Request, actor: CanWrite, service: Service, reference: Where, context: Which
) -> Data[ContextOut]:
    """Return one context."""
    return enveloped(request, context_out(await service.get(actor, reference, context)))


@router.post(
    "/{context}/run",
    responses={
        **errors(402, 404, 409, 413),
        200: {"description": "Events.", "content": {"text/event-stream": {}}},
    },
    response_model=None,
)
@takes_body(_BODY_MAX)
async def run_code(
    request: Request,
    actor: CanWrite,
    service: Service,
    check: MayFollow,
    reference: Where,
    context: Which,
    body: RunCode,
) -> Any:
    """Run code, and report by server-sent events: `stdout` and `stderr` with `text`, `result` with
    a value in all its forms, `error` with `name`, `value` and `traceback`, and finally `end`.

    One piece of code runs at a time in a context; others wait. If the client disconnects, the code
    is interrupted. An `error` with a `code` instead of a name is the server's, and the last event.
    """
    async with AsyncExitStack() as opening:
        reports = await opening.enter_async_context(
            service.run(actor, reference, context, body.piece())
        )
        held = opening.pop_all()
    return EventStream(_events(reports), held, check)


async def _events(reports: AsyncIterator[Report]) -> AsyncIterator[SseEvent]:
    decoders = {one: codecs.getincrementaldecoder("utf-8")("replace") for one in STREAMS}
    async for report in reports:
        match report:
            case Text(stream=stream, data=data):
                if text := decoders[stream].decode(data):
                    yield SseEvent(stream, {"text": text})
            case Result():
                yield SseEvent("result", result_out(report))
            case Finished(error=error):
                for stream, decoder in decoders.items():
                    if text := decoder.decode(b"", final=True):
                        yield SseEvent(stream, {"text": text})
                if error is not None:
                    yield SseEvent("error", code_error_out(error))
                yield SseEvent("end", {})


@router.post("/{context}/restart", responses=errors(402, 404, 409))
async def restart_context(
    request: Request, actor: CanWrite, service: Service, reference: Where, context: Which
) -> Data[ContextOut]:
    """Replace the interpreter of a context by a new one, and end everything that its code has
    started."""
    return enveloped(request, context_out(await service.restart(actor, reference, context)))


@router.post("/{context}/interrupt", responses=errors(402, 404, 409))
async def interrupt_context(
    request: Request, actor: CanWrite, service: Service, reference: Where, context: Which
) -> Data[InterruptedOut]:
    """Interrupt the code that a context runs, as Ctrl-C does. What was defined stays."""
    await service.interrupt(actor, reference, context)
    return enveloped(request, InterruptedOut(id=context, interrupted=True))


@router.delete("/{context}", responses=errors(402, 404, 409))
async def delete_context(
    request: Request, actor: CanWrite, service: Service, reference: Where, context: Which
) -> Data[RemovedOut]:
    """End a context, and everything that its code has started."""
    await service.delete(actor, reference, context)
    return enveloped(request, RemovedOut(id=context, deleted=True))
