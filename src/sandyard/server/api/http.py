"""The application: routes, error envelope, request ids, limits on what comes in."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from fastapi import FastAPI
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sandyard.server.api.errors import answer_error, install_handlers
from sandyard.server.api.routes import (
    activity,
    api_keys,
    billing,
    commands,
    health,
    organizations,
    projects,
    sandboxes,
    snapshots,
    ssh_keys,
    templates,
)
from sandyard.server.core.errors import InternalError, PayloadTooLargeError
from sandyard.server.core.ids import new_request_id
from sandyard.server.service.feed import Feed
from sandyard.server.service.money.billing import Billing
from sandyard.server.service.people.access import Access, no_credential
from sandyard.server.service.people.api_keys import ApiKeys
from sandyard.server.service.people.organizations import Organizations
from sandyard.server.service.people.rates import Allowance, Rates
from sandyard.server.service.people.ssh_keys import SshKeys
from sandyard.server.service.readiness import Readiness
from sandyard.server.service.sandboxes.change import Sandboxes
from sandyard.server.service.sandboxes.create import Creation
from sandyard.server.service.sandboxes.execute import Commands
from sandyard.server.service.sandboxes.snapshots import Snapshots
from sandyard.server.service.templates import Templates

log = logging.getLogger(__name__)

ROUTES = (
    sandboxes, commands, snapshots, organizations, projects, api_keys, ssh_keys, activity, billing,
    templates, health,
)  # fmt: skip
"""What is served, a module a subject."""
BODY_MAX = 32 * 1024 * 1024


class RequestObserver(Protocol):
    """Is told of every request that was answered."""

    def __call__(self, *, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request; `route` is the pattern, not the path."""
        ...


@dataclass(frozen=True)
class Services:
    """What the routes call."""

    access: Access
    rates: Rates
    organizations: Organizations
    api_keys: ApiKeys
    ssh_keys: SshKeys
    feed: Feed
    billing: Billing
    now: Callable[[], datetime]
    creation: Creation
    sandboxes: Sandboxes
    commands: Commands
    snapshots: Snapshots
    templates: Templates
    readiness: Readiness


def make_api(
    services: Services, *, version: str, observe: RequestObserver, bind: Callable[[str], object]
) -> FastAPI:
    """Return the application. `bind` is told each request's id before it is served."""
    app = FastAPI(
        title="Sandyard",
        version=version,
        description="Real virtual machines for agents and people.",
        redirect_slashes=False,
    )
    app.state.services = services
    app.state.log = log
    install_handlers(app)
    for routes in ROUTES:
        app.include_router(routes.router)
    _describe_truly(app)
    app.add_middleware(_Edge, observe=observe, bind=bind)
    return app


def _describe_truly(app: FastAPI) -> None:
    """Make the description true: bad input is answered 400, never 422; bodies have a limit."""
    made = app.openapi

    def describe() -> dict[str, Any]:
        description = made()
        for methods in description["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                if "requestBody" in operation:
                    operation["responses"]["413"] = {
                        **operation["responses"]["400"],
                        "description": "The body is too large.",
                    }
        return description

    app.openapi = describe  # type: ignore[method-assign]  # FastAPI's documented way


class _Edge:
    """Gives each request an id, bounds its body, and reports how it went."""

    def __init__(
        self, app: ASGIApp, *, observe: RequestObserver, bind: Callable[[str], object]
    ) -> None:
        self._app = app
        self._observe = observe
        self._bind = bind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        self._bind(request_id)
        started = time.perf_counter()
        status, has_started = 500, False

        async def send_with_id(message: Message) -> None:
            nonlocal status, has_started
            if message["type"] == "http.response.start":
                has_started = True
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    *_rate_headers(scope["state"].get("allowance")),
                ]
            await send(message)

        try:
            if _lacks_credential(scope):
                # Told before a body is read: strangers cannot make the server parse theirs.
                refusal = answer_error(Request(scope), no_credential())
                await refusal(scope, receive, send_with_id)
            else:
                await self._app(scope, _bounded(receive), send_with_id)
        except Exception as error:  # a bug: the caller gets an id, the log the rest
            log.exception("a request failed")
            if has_started:
                raise
            broken = answer_error(Request(scope), InternalError(str(error)))
            await broken(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self._observe(
                method=scope["method"],
                route=route,
                status=status,
                seconds=time.perf_counter() - started,
            )


def _rate_headers(allowance: Allowance | None) -> list[tuple[bytes, bytes]]:
    if allowance is None:  # nobody was let in, so nothing is counted
        return []
    return [
        (b"x-ratelimit-limit", str(allowance.limit).encode()),
        (b"x-ratelimit-remaining", str(allowance.remaining).encode()),
        (b"x-ratelimit-reset", str(allowance.resets_at).encode()),
    ]


def _lacks_credential(scope: Scope) -> bool:
    names = {name for name, _ in scope["headers"]}
    return scope["path"].startswith("/v1") and not names & {b"authorization", b"x-api-key"}


def _bounded(receive: Receive) -> Receive:
    size = 0

    async def receive_bounded() -> Message:
        nonlocal size
        message = await receive()
        if message["type"] == "http.request":
            size += len(message.get("body", b""))
            if size > BODY_MAX:
                raise PayloadTooLargeError(
                    f"cannot take a body of over {BODY_MAX // 2**20} MiB", limit=BODY_MAX
                )
        return message

    return receive_bounded


__all__ = ["BODY_MAX", "RequestObserver", "Services", "answer_error", "make_api"]
