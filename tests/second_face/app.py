"""The second API. It is added to a house by one registration: `faces=[make_second_face]`.

`POST /boxes` creates a sandbox and `POST /boxes/{id}/run` runs a command in it. The API answers at
`api.second.test` and below `box.second.test`, takes keys of the form `second_…` in the header
`Second-Key`, and reports errors as `{"ok": false, "problem": …}`.
"""

from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sandyard.server.core.errors import Code, InvalidTokenError, SandyardError
from sandyard.server.front.dispatch import FaceEntry
from sandyard.server.front.edge import Edge
from sandyard.server.front.face import EdgeServices, Face
from sandyard.server.front.hosts import below
from sandyard.server.service.actor import Admission
from sandyard.server.service.people.credentials import Credential
from sandyard.server.service.sandboxes.create import NewSandbox
from sandyard.server.service.sandboxes.execute import Command
from sandyard.server.service.services import Services

DOMAIN = "second.test"
PREFIX = "second_"
_STATUS = {Code.BAD_REQUEST: 422, Code.NOT_FOUND: 404, Code.FORBIDDEN: 403}
_FIELDS = {"idle_timeout": "sleepAfter", "timeout": "limit"}


@dataclass(frozen=True)
class SecondKey(Credential):
    """A key of this API: `second_` and an API key without its `rt_`."""

    secret: str


def make_second_face(services: Services, edge: EdgeServices) -> FaceEntry:
    """Make the face and its entry in the dispatch table."""

    async def verify(key: SecondKey) -> Admission:
        if not key.secret.startswith(PREFIX):
            raise InvalidTokenError(f"cannot accept the key: it does not begin with {PREFIX}")
        secret = "rt_" + key.secret.removeprefix(PREFIX)
        return Admission(await services.access.authenticate(secret))

    services.credentials.add(SecondKey, verify)
    face = Face(
        name="second",
        guards=lambda path: path.startswith("/boxes"),
        credentials=(_key_of,),
        render=_render,
        json_only=True,
    )
    app = Starlette(
        routes=[
            Route("/boxes", _create, methods=["POST"]),
            Route("/boxes/{box}/run", _run, methods=["POST"]),
        ],
        middleware=[Middleware(Edge, face=face, services=edge)],
        exception_handlers={SandyardError: _answer},
    )
    app.state.services = services
    return FaceEntry(below(DOMAIN), app)


def _key_of(connection: HTTPConnection) -> SecondKey | None:
    key = connection.headers.get("second-key")
    return None if key is None else SecondKey(key)


def _render(connection: HTTPConnection, error: SandyardError) -> Response:
    problem = error.message_with(lambda field: _FIELDS.get(field, field))
    return JSONResponse(
        {"ok": False, "problem": problem, "request": connection.state.request_id},
        status_code=_STATUS.get(error.code, 400),
    )


async def _answer(request: Request, error: Exception) -> Response:
    assert isinstance(error, SandyardError)
    return _render(request, error)


async def _create(request: Request) -> Response:
    body = await request.json()
    services: Services = request.app.state.services
    wish = NewSandbox(idle_timeout=body.get("sleepAfter", 600))
    sandbox = await services.creation.create(request.state.actor, wish)
    return JSONResponse({"ok": True, "box": sandbox.id}, status_code=201)


async def _run(request: Request) -> Response:
    body = await request.json()
    services: Services = request.app.state.services
    command = Command(
        command=body["line"], timeout=10_000, cwd="/", env={}, stdin=None, user="root"
    )
    outcome = await services.commands.execute(
        request.state.actor, request.path_params["box"], command
    )
    outcome.release()
    return JSONResponse({"ok": outcome.exit_code == 0, "printed": outcome.stdout.decode()})
