"""The sandbox that a request to its daemon is for, and what its clients leave out."""

import base64
import binascii
from dataclasses import dataclass, replace

from starlette.requests import Request

from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.records import Sandbox
from sandyard.server.e2b.awake import awake
from sandyard.server.e2b.credentials import FileSignature
from sandyard.server.service.actor import Actor
from sandyard.server.service.services import Services

_ROOT = "root"


@dataclass(frozen=True)
class Box:
    """A sandbox, who uses it, and the account and directory that are meant if none is named."""

    services: Services
    actor: Actor
    sandbox: Sandbox
    user: str
    workdir: str

    @property
    def id(self) -> str:
        """The sandbox's id."""
        return self.sandbox.id

    def as_user(self, name: str) -> "Box":
        """Return the same, used by another account."""
        return replace(self, user=name)

    @property
    def env(self) -> dict[str, str]:
        """The variables by which programs find out where they are."""
        return {
            "E2B_SANDBOX": "true",
            "E2B_SANDBOX_ID": self.sandbox.id,
            "E2B_TEMPLATE_ID": self.sandbox.template.partition("@")[0],
        }


async def box_of(request: Request) -> Box:
    """Return the sandbox that a request is for.

    Raises:
        NotFoundError: it does not exist, or has reached its end.
        InvalidArgumentError: the account is named in a way that cannot be read.
    """
    services: Services = request.app.state.services
    actor: Actor = request.state.actor
    sandbox_id = request.state.admission.sandbox_id
    sandbox = await services.sandboxes.get(actor, sandbox_id, scope="sandbox:write")
    sandbox = await awake(services, actor, sandbox)
    about = await services.templates.about(sandbox.org_id, sandbox.template)
    return Box(
        services=services,
        actor=actor,
        sandbox=sandbox,
        user=named_user(request) or (about and about.user) or _ROOT,
        workdir=(about and about.workdir) or "~",
    )


def named_user(request: Request) -> str | None:
    """Return the account that a request names by Basic authentication, if any."""
    scheme, _, encoded = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic" or isinstance(request.state.credential, FileSignature):
        return None  # a signature is for the account that was signed
    try:
        text = base64.b64decode(encoded.strip(), validate=True).decode()
    except (binascii.Error, ValueError) as error:
        raise InvalidArgumentError(
            "cannot read the header Authorization: it is not valid base64"
        ) from error
    return text.partition(":")[0] or None
