"""Bodies and answers of the control API."""

import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Final, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from sandyard.server.core.egress import NO_RULES, Egress, Injection, Policy
from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.records import NEXT_START, Sandbox, Snapshot
from sandyard.server.core.states import ON_ITS_WAY_UP, Status
from sandyard.server.service.sandboxes.lifecycle import is_over

ENVD_VERSION: Final = "0.6.13"
"""The version that is sent to clients, which ask for nothing newer."""
CLIENT: Final = "sandyard"
NO_END: Final = datetime(9999, 12, 31, tzinfo=UTC)
RUNNING: Final = ON_ITS_WAY_UP | {Status.RUNNING, Status.SUSPECTED_MISSING}
PAUSED: Final = frozenset({Status.PAUSING, Status.PAUSED, Status.ERROR})
ALIASES: Final[Mapping[str, str]] = {"base": "e2b-base", "code-interpreter-v1": "code-interpreter"}
"""Templates of ours by the names that clients know."""
DEFAULT_TAG: Final = "default"
"""The tag that a name without one means."""
_REFERENCE = re.compile(
    r"(?:[a-z0-9-]{1,63}/)?([A-Za-z0-9_.-]{1,128})(?::([A-Za-z0-9_.-]{1,128}))?"
)
_NAMES: Final = {template: alias for alias, template in ALIASES.items()}
TIMEOUT_MAX: Final = 30 * 86_400
Timeout = Annotated[int, Field(ge=0, le=TIMEOUT_MAX)]
Positive = Annotated[int, Field(ge=1, le=TIMEOUT_MAX)]
BodyT = TypeVar("BodyT", bound="Body")


class Body(BaseModel):
    """Base of the bodies. Fields that are unknown are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class AutoResume(Body):
    """Whether a paused sandbox is resumed when it is used."""

    enabled: bool = False


class Transform(Body):
    """What is done to requests to a host."""

    headers: dict[str, str] = {}


class HostRule(Body):
    """A rule for requests to a host."""

    transform: Transform | None = None


class Network(Body):
    """What a sandbox may reach, and who may reach it."""

    allow_public_traffic: bool | None = Field(None, alias="allowPublicTraffic")
    allow_out: list[str] | None = Field(None, alias="allowOut")
    deny_out: list[str] | None = Field(None, alias="denyOut")
    mask_request_host: str | None = Field(
        None, alias="maskRequestHost", pattern=r"^[A-Za-z0-9._:${}-]{1,255}$"
    )
    rules: dict[str, list[HostRule]] | None = None
    egress_proxy: Any = Field(None, alias="egressProxy")
    https_ports: Any = Field(None, alias="httpsPorts")
    dns_servers: Any = Field(None, alias="dnsServers")


ALL_TRAFFIC: Final = "0.0.0.0/0"
"""What clients write in `denyOut` for everything."""


def policy_of(network: Network | None, *, allows_internet: bool | None) -> Policy | None:
    """Return the network rules that a client asks for, or None if it does not ask for any.

    Raises:
        InvalidArgumentError: they contradict each other.
    """
    allow = () if network is None else tuple(network.allow_out or ())
    deny = () if network is None else tuple(network.deny_out or ())
    denies_all = allows_internet is False or ALL_TRAFFIC in deny
    inject = () if network is None else tuple(_injections_of(network.rules or {}))
    if not allow and not deny and not denies_all and not inject:
        return NO_RULES if allows_internet else None
    if not denies_all and any(not one.replace(".", "").replace("/", "").isdigit() for one in allow):
        raise InvalidArgumentError(
            "cannot use names in network.allowOut while everything else is allowed, too: add "
            f"{ALL_TRAFFIC} to denyOut, or set allowInternetAccess to false",
            field="network.allowOut",
        )
    return Policy(
        Egress.DENY if denies_all else Egress.ALLOW,
        allow,
        tuple(one for one in deny if one != ALL_TRAFFIC),
        inject=inject,
    )


def _injections_of(rules: Mapping[str, list[HostRule]]) -> Iterator[Injection]:
    for host, each in rules.items():
        headers: dict[str, str] = {}
        for rule in each:
            headers |= {} if rule.transform is None else rule.transform.headers
        if headers:
            yield Injection(host, headers)


class NetworkBody(Network):
    """The body of new rules."""

    allow_internet_access: bool | None = Field(
        None, validation_alias=AliasChoices("allow_internet_access", "allowInternetAccess")
    )


class NewSandboxBody(Body):
    """The body of a create. Older clients have another default of `timeout`."""

    template_id: str = Field(alias="templateID", min_length=1, max_length=200)
    timeout: Positive | None = None
    auto_pause: bool | None = Field(None, alias="autoPause")
    auto_pause_memory: bool | None = Field(None, alias="autoPauseMemory")
    auto_resume: AutoResume | None = Field(None, alias="autoResume")
    metadata: dict[str, str] | None = None
    env_vars: dict[str, str] | None = Field(None, alias="envVars")
    allow_internet_access: bool | None = Field(
        None, validation_alias=AliasChoices("allowInternetAccess", "allow_internet_access")
    )
    network: Network | None = None
    mcp: Any = None
    volume_mounts: Any = Field(None, alias="volumeMounts")
    iam: Any = None


class ConnectBody(Body):
    """The body of a connect."""

    timeout: Positive = 300
    memory: bool = True


class ResumeBody(Body):
    """The body of a resume, as older clients send it."""

    timeout: Positive = 15


class TimeoutBody(Body):
    """The body of a new end."""

    timeout: Timeout


class RefreshBody(Body):
    """The body of a later end."""

    duration: Timeout = 15


class PauseBody(Body):
    """The body of a pause."""

    memory: bool = True


class ForkBody(Body):
    """The body of a fork."""

    timeout: Positive = 15
    count: int = Field(1, ge=1, le=20)


class SnapshotBody(Body):
    """The body of a snapshot."""

    name: str | None = None
    memory: bool = True


class NewTemplateBody(Body):
    """The body of a new build: what is known before its files are uploaded."""

    name: str | None = Field(None, max_length=300)
    alias: str | None = Field(None, max_length=300)
    tags: list[str] | None = None
    vcpus: int = Field(2, alias="cpuCount")
    memory_mib: int = Field(1024, alias="memoryMB", ge=1)
    disk_mib: int | None = Field(None, alias="minFreeDiskMb", ge=0)


class StepBody(Body):
    """A step of a build."""

    type: str
    args: list[str] | None = None
    files_hash: str | None = Field(None, alias="filesHash", pattern=r"^[0-9a-f]{64}$")
    force: bool | None = None


class BuildBody(Body):
    """The body that begins a build."""

    from_image: str | None = Field(None, alias="fromImage")
    from_template: str | None = Field(None, alias="fromTemplate")
    registry: Any = Field(None, alias="fromImageRegistry")
    steps: list[StepBody] | None = None
    start: str | None = Field(None, alias="startCmd")
    ready: str | None = Field(None, alias="readyCmd")
    force: bool | None = None


class TagsBody(Body):
    """The body of new tags, for the version that `target` names."""

    target: str = Field(max_length=300)
    tags: list[str] = Field(min_length=1, max_length=20)


class UntagBody(Body):
    """The body of tags to remove."""

    name: str = Field(max_length=300)
    tags: list[str] = Field(min_length=1, max_length=20)


def name_and_tag(reference: str) -> tuple[str, str | None]:
    """Return the template that clients call `[team/]name[:tag]`, by its name here, and the tag.

    Raises:
        InvalidArgumentError: it is no such name.
    """
    found = _REFERENCE.fullmatch(reference)
    if found is None:
        raise InvalidArgumentError(
            f"cannot use the name {reference[:80]!r}: write it as name or name:tag", field="name"
        )
    # Clients may use underscores and capitals, which have no difference of their own there.
    name = ALIASES.get(found[1], found[1].lower().replace("_", "-"))
    return name, found[2].lower() if found[2] else None


async def body_of(request: Request, kind: type[BodyT]) -> BodyT:
    """Return a request's body; without one, that of an empty object.

    Raises:
        InvalidArgumentError: it is no such body; `facts` name the field.
    """
    data = await request.body()
    try:
        value = json.loads(data) if data.strip() else {}
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(
            "cannot read the body: it is not valid JSON", field="body"
        ) from error
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(one) for one in first["loc"]) or "body"
        raise InvalidArgumentError(f"cannot use {field}: {first['msg']}", field=field) from error


def meaning_of(body: bytes) -> bytes:
    """Return a body so that two of the same meaning are the same."""
    try:
        return json.dumps(json.loads(body), sort_keys=True).encode()
    except ValueError:
        return body


# --- answers --------------------------------------------------------------------------------


def state_of(sandbox: Sandbox, now: datetime) -> str | None:
    """Return `running` or `paused`; None for a sandbox that is gone, or has reached its end."""
    if sandbox.status in RUNNING and is_over(sandbox, now):
        return "paused" if sandbox.pauses_at_end else None
    if sandbox.status in RUNNING:
        return "running"
    return "paused" if sandbox.status in PAUSED else None


def template_of(sandbox: Sandbox) -> str:
    """Return the id of a sandbox's template."""
    return sandbox.template.partition("@")[0]


def listed(sandbox: Sandbox, now: datetime) -> dict[str, object]:
    """Return what a list tells of a sandbox."""
    template = template_of(sandbox)
    end = sandbox.expires_at or (
        sandbox.paused_at if sandbox.status in PAUSED and sandbox.paused_at else NO_END
    )
    return {
        "templateID": template,
        "alias": _NAMES.get(template, template),
        "sandboxID": sandbox.id,
        "clientID": CLIENT,
        "startedAt": moment(sandbox.created_at),
        "endAt": moment(end),
        "cpuCount": sandbox.shape.vcpus,
        "memoryMB": sandbox.shape.memory_mib,
        "diskSizeMB": sandbox.shape.disk_mib,
        "state": state_of(sandbox, now),
        "envdVersion": ENVD_VERSION,
        "metadata": {name: _text(value) for name, value in sandbox.metadata.items()},
    }


def detailed(
    sandbox: Sandbox, now: datetime, *, token: str | None, domain: str | None
) -> dict[str, object]:
    """Return the details of a sandbox, with its token for callers who may use it."""
    rules, is_open = sandbox.network, sandbox.network.egress is Egress.ALLOW
    network: dict[str, object] = {"allowPublicTraffic": sandbox.public_ports}
    if not rules.is_default:
        network["allowOut"] = list(rules.allow)
        network["denyOut"] = [*rules.deny, *(() if is_open else (ALL_TRAFFIC,))]
    if rules.inject:
        network["rules"] = {
            one.host: [{"transform": {"headers": dict(one.headers)}}] for one in rules.inject
        }
    if sandbox.port_host is not None:
        network["maskRequestHost"] = sandbox.port_host
    return {
        **listed(sandbox, now),
        "domain": domain,
        **({} if token is None else {"envdAccessToken": token}),
        "allowInternetAccess": is_open,
        "network": network,
        "lifecycle": {
            "autoResume": sandbox.auto_resume,
            "onTimeout": "pause" if sandbox.pauses_at_end else "kill",
        },
        **_pause_mode(sandbox),
    }


def _pause_mode(sandbox: Sandbox) -> dict[str, str]:
    """Return what the pause of a paused sandbox has saved."""
    if sandbox.status is not Status.PAUSED:
        return {}
    boots = sandbox.from_disk_incarnation == NEXT_START
    return {"pauseMode": "filesystem" if boots else "full"}


def opened(
    sandbox: Sandbox, *, token: str, traffic_token: str, domain: str | None
) -> dict[str, object]:
    """Return what a client needs to use a sandbox."""
    template = template_of(sandbox)
    return {
        "templateID": template,
        "alias": _NAMES.get(template, template),
        "sandboxID": sandbox.id,
        "clientID": CLIENT,
        "envdVersion": ENVD_VERSION,
        "envdAccessToken": token,
        "trafficAccessToken": traffic_token,
        "domain": domain,
    }


def snapshot_values(snapshot: Snapshot) -> dict[str, object]:
    """Return a snapshot as JSON values."""
    names = [] if snapshot.name is None else [f"{snapshot.name}:default"]
    return {"snapshotID": snapshot.id, "names": names}


def moment(at: datetime) -> str:
    """Return a time as RFC 3339."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _text(value: object) -> str:
    """Return a value of the metadata as text: other APIs keep any JSON in it."""
    return value if isinstance(value, str) else json.dumps(value)
