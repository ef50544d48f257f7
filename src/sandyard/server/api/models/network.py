"""Network rules of sandboxes, and what became of connections, as HTTP carries them."""

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import Field

from sandyard.server.api.models.base import NAME_OF_HOST, Body, Model, Time
from sandyard.server.core.contracts.node import Connection
from sandyard.server.core.egress import Egress, Injection, Policy


class InjectionIn(Body):
    """Headers for a host, in place of the guest's own."""

    host: str = Field(examples=["api.github.com"], description="A name, or `*.` and a name.")
    headers: dict[str, str] = Field(
        examples=[{"Authorization": "Bearer ${GITHUB}"}],
        description="`${NAME}` stands for a secret, `${base64:user:NAME}` for a name and a secret "
        "as in Basic authentication.",
    )


class InjectionOut(Model):
    """Headers for a host; see `InjectionIn`."""

    host: str
    headers: dict[str, str]


_PORT = ":([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
_RANGE = "[0-9.]+(/[0-9.]+)?"
Rules = list[
    Annotated[str, Field(json_schema_extra={"pattern": rf"^({NAME_OF_HOST}({_PORT})?|{_RANGE})$"})]
]
Ranges = list[Annotated[str, Field(json_schema_extra={"pattern": f"^({_RANGE})$"})]]
Names = list[Annotated[str, Field(json_schema_extra={"pattern": f"^{NAME_OF_HOST}$"})]]


class NetworkIn(Body):
    """What a sandbox may reach. Private ranges are never reached, except those that the operator
    allows. Then `allow` decides, then `deny`, then `egress`."""

    egress: Literal["allow", "deny"] = Field("allow", description="For what no rule names.")
    allow: Rules = Field(
        [],
        examples=[["github.com", "*.githubusercontent.com", "github.com:22", "203.0.113.0/24"]],
        description="Ranges; names (`*.` for all below one), whose ports 80 and 443 are opened; "
        "names with one port.",
    )
    deny: Ranges = Field([], examples=[["198.51.100.0/24"]], description="Ranges.")
    inspect: Names = Field(
        [],
        examples=[["*.githubusercontent.com"]],
        description="Names whose TLS is ended outside the machine: each request is judged by its "
        "Host.",
    )
    inject: list[InjectionIn] = Field(
        [],
        description="Headers that requests are given outside the machine. TLS with these hosts is "
        "ended there.",
    )

    def policy(self) -> Policy:
        """Return the rules."""
        return Policy(
            Egress(self.egress),
            tuple(self.allow),
            tuple(self.deny),
            tuple(self.inspect),
            tuple(Injection(one.host, one.headers) for one in self.inject),
        )


class NetworkOut(Model):
    """What a sandbox may reach; see `NetworkIn`."""

    egress: Literal["allow", "deny"]
    allow: list[str]
    deny: list[str]
    inspect: list[str]
    inject: list[InjectionOut]


def network_out(policy: Policy) -> NetworkOut:
    """Return rules as they are shown."""
    return NetworkOut(
        egress=policy.egress.value,
        allow=list(policy.allow),
        deny=list(policy.deny),
        inspect=list(policy.inspect),
        inject=[InjectionOut(host=one.host, headers=dict(one.headers)) for one in policy.inject],
    )


class ConnectionOut(Model):
    """A connection that has ended or was refused, a name that was not resolved, or the number of
    lines that were left out of the journal."""

    time: Time
    verdict: Literal["allowed", "refused", "skipped"]
    rule: str = Field(
        description="What decided: an entry of `allow` or `deny`, `egress`, `private`, or what "
        "failed."
    )
    name: str
    address: str
    port: int
    bytes_out: int
    bytes_in: int
    duration_ms: int
    count: int = Field(description="How many lines were left out; 0 in all others.")
    secrets: list[str] = Field(description="The names of the secrets that were sent along.")


def connection_out(connection: Connection) -> ConnectionOut:
    """Return a line of the journal as it is shown."""
    shown = vars(connection) | {
        "time": datetime.fromtimestamp(connection.time, UTC),
        "secrets": list(connection.secrets),
    }
    return ConnectionOut.model_validate(shown, by_name=True)
