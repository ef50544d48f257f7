"""The routes of the control API for sandboxes and snapshots."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from math import inf
from typing import Any, Final
from urllib.parse import parse_qsl, unquote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sandyard.server.core.egress import NO_RULES
from sandyard.server.core.errors import (
    ConflictError,
    GuestNotFoundError,
    InvalidArgumentError,
    NotFoundError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.ids import checked_text
from sandyard.server.core.ops import Figures, Sample
from sandyard.server.core.records import Sandbox, SandboxQuery
from sandyard.server.core.scopes import is_covered
from sandyard.server.core.states import Status
from sandyard.server.e2b.control import models
from sandyard.server.e2b.control.models import (
    PAUSED,
    RUNNING,
    ConnectBody,
    ForkBody,
    NewSandboxBody,
    PauseBody,
    RefreshBody,
    ResumeBody,
    SnapshotBody,
    TimeoutBody,
    body_of,
    state_of,
)
from sandyard.server.e2b.errors import render_control
from sandyard.server.e2b.names import client_domain
from sandyard.server.front.bodies import takes_body
from sandyard.server.front.cursors import decode_cursor, encode_cursor
from sandyard.server.service.actor import Actor
from sandyard.server.service.repeats import Repeatable
from sandyard.server.service.sandboxes.change import Changes
from sandyard.server.service.sandboxes.create import NewSandbox
from sandyard.server.service.sandboxes.fields import check_metadata
from sandyard.server.service.services import Services
from sandyard.server.service.templates.templates import Chosen

_CREATE_MAX = 256 * 1024
_START_S = 55.0
_DEFAULT_TIMEOUT_S, _OLD_TIMEOUT_S = 300, 15
_PAGE = 100
_KEY = re.compile(r"[a-z0-9-]{1,255}")
_UP_AGAIN = PAUSED | {Status.RESUMING}
_NEVER_RAN = frozenset({Status.PENDING, Status.CREATING, Status.FAILED})
_STATES: Final = {"running": RUNNING, "paused": PAUSED}
_NEXT = "x-next-token"


class Control:
    """What each route works with."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.services: Services = request.app.state.services
        self.actor: Actor = request.state.actor
        self.now = self.services.clock.now()

    @property
    def domain(self) -> str | None:
        """The domain that is sent to clients."""
        return client_domain(self.request.scope, self.request.app.state.domain)

    @property
    def sandbox_id(self) -> str:
        """The sandbox that the path names."""
        return str(self.request.path_params["sandbox_id"])

    async def found(self, *, scope: str = "sandbox:read") -> Sandbox:
        """Return the sandbox that the path names.

        Raises:
            NotFoundError: it is not there for clients of this API.
        """
        reference = checked_text(self.sandbox_id, field="sandboxID")
        sandbox = await self.services.sandboxes.get(self.actor, reference, scope=scope)
        if state_of(sandbox, self.now) is None:
            raise NotFoundError(f"cannot find the sandbox {self.sandbox_id[:80]!r}")
        return sandbox

    async def running(self) -> Sandbox:
        """Return the sandbox that the path names, to change it.

        Raises:
            NotFoundError: it does not run, or see `found`.
        """
        sandbox = await self.found(scope="sandbox:write")
        if state_of(sandbox, self.now) != "running":
            raise NotFoundError(f"cannot find the sandbox {sandbox.id}: it is not running")
        return sandbox

    def opened(self, sandbox: Sandbox) -> dict[str, object]:
        """Return what a client needs to use a sandbox."""
        tokens = self.services.tokens
        return models.opened(
            sandbox,
            token=tokens.access(sandbox.id),
            traffic_token=tokens.traffic(sandbox.id),
            domain=self.domain,
        )

    async def repeatable(self) -> Repeatable | None:
        """Return the request with its idempotency key, if it has one."""
        key = self.request.headers.get("idempotency-key")
        if key is None:
            return None
        if not _KEY.fullmatch(key):
            raise InvalidArgumentError(
                "cannot use the Idempotency-Key: it has 1 to 255 lower-case letters, digits and -",
                field="idempotency_key",
            )
        body = models.meaning_of(await self.request.body())
        return Repeatable(f"e2b {self.request.method} {self.request.url.path}", key, body)


# --- creating -------------------------------------------------------------------------------


@takes_body(_CREATE_MAX)
async def create(request: Request) -> Response:
    """Create a sandbox, and answer once it runs."""
    control = Control(request)
    services, actor = control.services, control.actor
    actor.require("sandbox:write")  # which the token that is answered gives
    body = await body_of(request, NewSandboxBody)
    _check_offered(body)
    is_old = not request.url.path.startswith("/v2/")
    timeout = body.timeout or (_OLD_TIMEOUT_S if is_old else _DEFAULT_TIMEOUT_S)
    chosen, snapshot = await _source(control, body.template_id)
    wish = NewSandbox(
        chosen=chosen,
        snapshot=snapshot,
        idle_timeout=0,
        env=body.env_vars or {},
        metadata=body.metadata or {},
        auto_resume=body.auto_resume is not None and body.auto_resume.enabled,
        expires_in=timeout,
        ends_from_start=True,
        pauses_at_end=bool(body.auto_pause),
        keeps_memory=body.auto_pause_memory is not False,
        public_ports=request.app.state.has_public_ports and _is_public(body),
        port_host=body.network.mask_request_host if body.network else None,
        ssh_keys=None,
        network=models.policy_of(body.network, allows_internet=body.allow_internet_access),
    )
    repeatable = await control.repeatable()
    sandbox = await services.creation.create(actor, wish, request=repeatable, wait_s=_START_S)
    if sandbox.status in _NEVER_RAN and sandbox.started_at is None:
        why = f": {sandbox.reason.message}" if sandbox.reason else " in time"
        await services.creation.forget(actor, repeatable, sandbox)
        await services.sandboxes.delete(actor, sandbox.id, wait=False)
        raise UnavailableError(f"cannot start the sandbox{why}; nothing is left of it")
    if state_of(sandbox, services.clock.now()) is None:  # the same request again, too late
        raise NotFoundError(f"cannot find the sandbox {sandbox.id}: it was deleted since")
    return JSONResponse(control.opened(sandbox), status_code=201)


def _is_public(body: NewSandboxBody) -> bool:
    return body.network is None or body.network.allow_public_traffic is not False


def _check_offered(body: NewSandboxBody) -> None:
    """Refuse what this version does not have: it would be missed without a word."""
    given = {
        "mcp": body.mcp,
        "volumeMounts": body.volume_mounts,
        "iam": (body.iam or {}).get("tokens") if isinstance(body.iam, dict) else body.iam,
    }
    for field, value in given.items():
        if value:
            raise _not_offered(field)
    if body.network is not None:
        _check_network(body.network)
    resumes = body.auto_resume is not None and body.auto_resume.enabled
    if body.auto_pause_memory is False and (resumes or not body.auto_pause):
        raise InvalidArgumentError(
            "cannot use autoPauseMemory: false without autoPause, or with autoResume",
            field="autoPauseMemory",
        )


def _check_network(network: models.Network) -> None:
    given = {
        "egressProxy": network.egress_proxy,
        "httpsPorts": network.https_ports,
        "dnsServers": network.dns_servers,
    }
    for field, value in given.items():
        if value:
            raise _not_offered(f"network.{field}")


def _not_offered(field: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"cannot use {field}: this server does not support it yet; leave it out", field=field
    )


async def _source(control: Control, reference: str) -> tuple[Chosen | None, str | None]:
    """Return the template or the snapshot that a client names.

    Raises:
        NotFoundError: there is none.
    """
    try:
        return (await template_of(control, reference))[1], None
    except InvalidArgumentError:
        pass
    name = reference.rpartition("/")[2].partition(":")[0]
    try:
        snapshot = await control.services.snapshots.get(control.actor, name)
    except NotFoundError as error:
        raise _no_template(reference) from error
    return None, snapshot.id


async def template_of(control: Control, reference: str) -> tuple[str, Chosen]:
    """Return the template that a client names, by the name that the service takes. Without a tag it
    is the version with the tag `default`, or else the latest.

    Raises:
        InvalidArgumentError: there is none.
    """
    name, tag = models.name_and_tag(reference)
    wanted = [f"{name}:{tag or models.DEFAULT_TAG}"]
    if tag in (None, models.DEFAULT_TAG):
        wanted.append(name)
    for one in wanted:
        try:
            return one, await control.services.templates.choose(control.actor, one)
        except InvalidArgumentError:
            if one is wanted[-1]:
                raise
    raise AssertionError(reference)


def _no_template(reference: str) -> NotFoundError:
    return NotFoundError(
        f"cannot find the template {reference[:80]!r}: there is no template and no snapshot of "
        "this name"
    )


# --- one sandbox ----------------------------------------------------------------------------


async def get(request: Request) -> Response:
    """Return the details of a sandbox."""
    control = Control(request)
    sandbox = await control.found()
    may_use = is_covered("sandbox:write", control.actor.scopes)
    token = control.services.tokens.access(sandbox.id) if may_use else None
    return JSONResponse(models.detailed(sandbox, control.now, token=token, domain=control.domain))


async def kill(request: Request) -> Response:
    """Delete a sandbox."""
    control = Control(request)
    await control.found(scope="sandbox:write")
    await control.services.sandboxes.delete(control.actor, control.sandbox_id, wait=False)
    return Response(status_code=204)


async def connect(request: Request) -> Response:
    """Resume a sandbox if it is paused, and put its end off: it never comes earlier."""
    control = Control(request)
    body = await body_of(request, ConnectBody)
    sandbox = await control.found(scope="sandbox:write")
    was_running = state_of(sandbox, control.now) == "running"
    if sandbox.status in RUNNING:  # perhaps past its end, and not paused yet
        sandbox = await _put_off(control, sandbox, body.timeout)
    if sandbox.status in _UP_AGAIN:
        sandbox = await _resumed(control, body.timeout, keeps_memory=body.memory)
    if state_of(sandbox, control.now) is None:  # it reached its end meanwhile
        raise NotFoundError(f"cannot connect to {sandbox.id}: it has ended")
    return JSONResponse(control.opened(sandbox), status_code=200 if was_running else 201)


async def resume(request: Request) -> Response:
    """Resume a paused sandbox, as older clients ask for it."""
    control = Control(request)
    body = await body_of(request, ResumeBody)
    sandbox = await control.found(scope="sandbox:write")
    if state_of(sandbox, control.now) == "running":
        raise ConflictError(f"cannot resume {sandbox.id}: it is running", status="running")
    return JSONResponse(control.opened(await _resumed(control, body.timeout)), status_code=201)


async def _resumed(control: Control, timeout: int, *, keeps_memory: bool = True) -> Sandbox:
    """Return a sandbox once it runs. Of several resumes at once the longest timeout counts."""
    sandbox = await control.services.sandboxes.resume(
        control.actor, control.sandbox_id, lives_s=timeout, keeps_memory=keeps_memory
    )
    return await _put_off(control, sandbox, timeout)


async def _put_off(control: Control, sandbox: Sandbox, timeout: int) -> Sandbox:
    changes = Changes(expires_in=timeout, only_later=True)
    return await control.services.sandboxes.change(control.actor, sandbox.id, changes)


async def set_timeout(request: Request) -> Response:
    """Set the end of a running sandbox, also to an earlier one."""
    control = Control(request)
    body = await body_of(request, TimeoutBody)
    sandbox = await control.running()
    if body.timeout > 0:
        changes = Changes(expires_in=body.timeout)
        await control.services.sandboxes.change(control.actor, sandbox.id, changes)
    elif sandbox.pauses_at_end:
        await control.services.sandboxes.pause(
            control.actor, sandbox.id, wait=False, keeps_memory=sandbox.keeps_memory
        )
    else:
        await control.services.sandboxes.delete(control.actor, sandbox.id, wait=False)
    return Response(status_code=204)


async def refresh(request: Request) -> Response:
    """Put the end of a running sandbox off, as older clients ask for it."""
    control = Control(request)
    body = await body_of(request, RefreshBody)
    sandbox = await control.running()
    await _put_off(control, sandbox, max(1, body.duration))
    return Response(status_code=204)


async def pause(request: Request) -> Response:
    """Pause a sandbox. It has no end until it is resumed."""
    control = Control(request)
    body = await body_of(request, PauseBody)
    sandbox = await control.found(scope="sandbox:write")
    if state_of(sandbox, control.now) == "paused":
        raise ConflictError(f"cannot pause {sandbox.id}: it is paused", status="paused")
    await control.services.sandboxes.pause(
        control.actor, sandbox.id, clears_end=True, keeps_memory=body.memory
    )
    return Response(status_code=204)


async def set_network(request: Request) -> Response:
    """Replace the rules of what a sandbox may reach. They are in force when this is answered."""
    control = Control(request)
    body = await body_of(request, models.NetworkBody)
    sandbox = await control.running()
    _check_network(body)
    policy = models.policy_of(body, allows_internet=body.allow_internet_access)
    await control.services.sandboxes.change(
        control.actor, sandbox.id, Changes(network=policy or NO_RULES)
    )
    return Response(status_code=204)


async def fork(request: Request) -> Response:
    """Fork a sandbox."""
    control = Control(request)
    body = await body_of(request, ForkBody)
    sandbox = await control.found(scope="sandbox:write")
    forks = await control.services.snapshots.fork(
        control.actor,
        sandbox.id,
        body.count,
        request=await control.repeatable(),
        expires_in=body.timeout,
    )
    return JSONResponse([{"sandbox": control.opened(one)} for one in forks], status_code=201)


async def metrics(request: Request) -> Response:
    """Return what a sandbox has used in a time, oldest first: samples of the last hour, and one of
    now if that is in it."""
    control = Control(request)
    sandbox = await control.found()
    now = control.now
    start, end = (_seconds(request, name) for name in ("start", "end"))
    if state_of(sandbox, now) != "running":
        return JSONResponse([])
    try:
        _, found = await control.services.sandboxes.stats(
            control.actor, sandbox.id, since_ms=int((start or 0) * 1000)
        )
    except (ConflictError, UnavailableError, GuestNotFoundError):
        return JSONResponse([])  # it is just starting

    def sample(at: datetime, used: Figures | Sample) -> dict[str, object]:
        return {
            "timestamp": models.moment(at),
            "timestampUnix": int(at.timestamp()),
            "cpuCount": sandbox.shape.vcpus,
            "cpuUsedPct": used.cpu_percent,
            "memUsed": used.memory_used_bytes,
            "memTotal": used.memory_total_bytes,
            "memCache": 0,
            "diskUsed": used.disk_used_bytes,
            "diskTotal": used.disk_total_bytes,
        }

    # By the guest's clock, which its user may have set.
    earlier = [(one.at_ms / 1000, one) for one in found.earlier]
    samples = [
        sample(datetime.fromtimestamp(at, UTC), one)
        for at, one in earlier
        if (start or 0) <= at <= min(end or inf, now.timestamp())
    ]
    if (start or 0) - 5 <= now.timestamp() <= (end or inf) + 5:
        samples.append(sample(now, found))
    return JSONResponse(samples)


def _seconds(request: Request, name: str) -> int | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise InvalidArgumentError(f"cannot use {name}: it is in seconds since 1970", field=name)
    return int(text)


# --- lists ----------------------------------------------------------------------------------


async def list_sandboxes(request: Request) -> Response:
    """List sandboxes, newest first unless asked otherwise; older clients get the running ones."""
    control = Control(request)
    query = request.query_params
    is_old = not request.url.path.startswith("/v2/")
    states = ["running"] if is_old else _states(query.getlist("state"))
    limit = _limit(query.get("limit"), most=1000 if is_old else _PAGE)
    token = query.get("nextToken")
    actor = control.actor
    asked = SandboxQuery(
        org_id=actor.org_id,
        limit=limit + 1,
        owner_user_id=None if actor.sees_all else actor.user_id,
        statuses=frozenset().union(*(_STATES[one] for one in states)),
        template=_template_asked(query.get("template")),
        metadata=_metadata(query.get("metadata")),
        created_from=_time(query.get("startedAfter")),
        oldest_first=_is_ascending(query.get("order")),
        after=_place(token) if token else None,
    )
    found = await control.services.sandboxes.page(actor, asked, wants_all=False)
    page = found[:limit]
    shown = [
        models.listed(one, control.now) for one in page if state_of(one, control.now) in states
    ]
    headers = {}
    if len(found) > limit:
        headers[_NEXT] = encode_cursor(page[-1].created_at, page[-1].id)
    return JSONResponse(shown, headers=headers)


def _template_asked(name: str | None) -> str | None:
    if not name:
        return None
    name = checked_text(name, field="template")
    return models.name_and_tag(name)[0]


def _states(given: list[str]) -> list[str]:
    names = [name for one in given for name in one.split(",") if name] or list(_STATES)
    for name in names:
        if name not in _STATES:
            raise InvalidArgumentError(
                "cannot use state: it is running, paused, or both", field="state"
            )
    return names


def _metadata(text: str | None) -> Mapping[str, object] | None:
    """Return the metadata that a query asks for: a query string, whose parts are quoted again."""
    if not text:
        return None
    pairs = parse_qsl(text, keep_blank_values=True)
    found = {unquote(name): unquote(value) for name, value in pairs}
    check_metadata(found)
    return found


def _time(text: str | None) -> datetime | None:
    if not text:
        return None
    try:
        at = datetime.fromisoformat(text)
        return (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidArgumentError(
            "cannot use startedAfter: it is a time such as 2026-01-02T03:04:05Z",
            field="startedAfter",
        ) from error


def _is_ascending(order: str | None) -> bool:
    if order not in (None, "asc", "desc"):
        raise InvalidArgumentError("cannot use order: it is asc or desc", field="order")
    return order == "asc"


def _limit(text: str | None, *, most: int) -> int:
    if not text:
        return most
    if not re.fullmatch(r"[0-9]{1,4}", text) or not 1 <= int(text) <= most:
        raise InvalidArgumentError(f"cannot use limit: it is 1 to {most}", field="limit")
    return int(text)


def _place(token: str) -> tuple[datetime, str]:
    try:
        return decode_cursor(token)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(
            "cannot use nextToken: take it unchanged from the header x-next-token",
            field="nextToken",
        ) from error


# --- snapshots ------------------------------------------------------------------------------


async def create_snapshot(request: Request) -> Response:
    """Save the state of a sandbox, which goes on."""
    control = Control(request)
    body = await body_of(request, SnapshotBody)
    if not body.memory:
        raise InvalidArgumentError(
            "cannot make a snapshot without memory: leave memory out",
            field="memory",
            error_code="snapshot_filesystem_only_disabled",
        )
    sandbox = await control.found(scope="sandbox:write")
    name = None if body.name is None else body.name.rpartition("/")[2].partition(":")[0]
    snapshot = await control.services.snapshots.create(
        control.actor, sandbox.id, name, request=await control.repeatable(), takes_name=True
    )
    return JSONResponse(models.snapshot_values(snapshot), status_code=201)


async def list_snapshots(request: Request) -> Response:
    """List snapshots, newest first."""
    control = Control(request)
    query = request.query_params
    limit = _limit(query.get("limit"), most=_PAGE)
    sandbox_id, name = query.get("sandboxID"), query.get("name")
    name = None if not name else name.rpartition("/")[2].partition(":")[0]
    token = query.get("nextToken")
    after = _place(token) if token else None
    found: list[Any] = []
    while len(found) <= limit:
        page = await control.services.snapshots.page(control.actor, limit=_PAGE, after=after)
        found += [
            one
            for one in page
            if one.is_ready
            and (not sandbox_id or one.sandbox_id == sandbox_id)
            and (name is None or one.name == name)
        ]
        if len(page) < _PAGE:
            break
        after = (page[-1].created_at, page[-1].id)
    shown = found[:limit]
    headers = {}
    if len(found) > limit:
        headers[_NEXT] = encode_cursor(shown[-1].created_at, shown[-1].id)
    return JSONResponse([models.snapshot_values(one) for one in shown], headers=headers)


# --- the rest -------------------------------------------------------------------------------


async def not_there(request: Request) -> Response:
    """Refuse what this version does not have, by name."""
    what = request.url.path.split("/")[1]
    error = InvalidArgumentError(
        f"cannot serve /{what}: this server does not support {what} yet", field="path"
    )
    status = 501 if what == "secrets" else 400
    return JSONResponse({"code": status, "message": error.message}, status_code=status)


async def absent(request: Request) -> Response:
    """Answer for a path that does not exist."""
    error: SandyardError = NotFoundError(
        f"cannot find {request.method} {request.url.path[:200]}: the E2B API has no such route here"
    )
    return render_control(request, error)


_ONE = "/sandboxes/{sandbox_id}"
_ALL_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
ROUTES: Final = [
    Route("/v2/sandboxes", create, methods=["POST"]),
    Route("/sandboxes", create, methods=["POST"]),
    Route("/v2/sandboxes", list_sandboxes, methods=["GET"]),
    Route("/sandboxes", list_sandboxes, methods=["GET"]),
    Route(_ONE, get, methods=["GET"]),
    Route(_ONE, kill, methods=["DELETE"]),
    Route(f"/v2{_ONE}/connect", connect, methods=["POST"]),
    Route(f"{_ONE}/connect", connect, methods=["POST"]),
    Route(f"{_ONE}/resume", resume, methods=["POST"]),
    Route(f"{_ONE}/refreshes", refresh, methods=["POST"]),
    Route(f"{_ONE}/timeout", set_timeout, methods=["POST"]),
    Route(f"{_ONE}/pause", pause, methods=["POST"]),
    Route(f"{_ONE}/network", set_network, methods=["PUT"]),
    Route(f"{_ONE}/fork", fork, methods=["POST"]),
    Route(f"{_ONE}/metrics", metrics, methods=["GET"]),
    Route(f"{_ONE}/snapshots", create_snapshot, methods=["POST"]),
    Route("/snapshots", list_snapshots, methods=["GET"]),
    Route("/volumes{rest:path}", not_there, methods=_ALL_METHODS),
    Route("/secrets{rest:path}", not_there, methods=_ALL_METHODS),
]
"""What is served."""
