"""Who acts, within which organization, and what they may do there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from sandyard.server.core.errors import PermissionDeniedError
from sandyard.server.core.plans import Plan
from sandyard.server.core.records import ActorKind, Role
from sandyard.server.core.scopes import ADMINS_ONLY, is_covered


@dataclass(frozen=True)
class Actor:
    """A user who acts within one organization.

    One that is not `is_bound` can switch to the user's other organizations. `plan` and `limits` are
    the organization's. With `is_test`, what is created belongs to a test key. `key_generation`
    identifies the API key's secret (`ids.generation_of`).
    """

    org_id: str
    user_id: str
    role: Role
    scopes: frozenset[str]
    kind: ActorKind
    key_id: str | None = None
    key_generation: str = ""
    is_bound: bool = True
    is_operator: bool = False
    is_test: bool = False
    plan: str = "enterprise"
    limits: Mapping[str, int] = field(default_factory=dict)

    @property
    def sees_all(self) -> bool:
        """Whether the actor sees and acts on other members' resources."""
        # Named, not covered by `*`: a member's key for everything is not an admin's.
        return self.role == "admin" or not self.scopes.isdisjoint(ADMINS_ONLY)

    def require(self, scope: str) -> None:
        """Return if the actor holds a scope.

        Raises:
            PermissionDeniedError: it does not; `facts` name the scope.
        """
        if not is_covered(scope, self.scopes):
            raise PermissionDeniedError(
                f"cannot do this with the credential given: it lacks the scope {scope}",
                required_scope=scope,
            )

    def require_admin(self) -> None:
        """Return if the actor is an admin of the organization.

        Raises:
            PermissionDeniedError: it is a member; `facts` name the role.
        """
        if self.role != "admin":
            raise PermissionDeniedError(
                "cannot do this as a member: it takes the role admin; ask one of the "
                "organization's admins",
                required_role="admin",
            )

    def require_operator(self) -> None:
        """Return if the actor runs the installation.

        Raises:
            PermissionDeniedError: it does not.
        """
        if not self.is_operator:
            raise PermissionDeniedError(
                "cannot do this: it takes an operator of the installation, who can also use "
                "`sandyard admin` on the host",
                required_role="operator",
            )

    def may_grant(self, scope: str) -> bool:
        """Tell whether the actor can give a key this scope."""
        if scope in ADMINS_ONLY:
            return self.role == "admin" and is_covered(scope, self.scopes)
        return is_covered(scope, self.scopes)


@dataclass(frozen=True)
class Admission:
    """The actor that a credential authenticates, and the resource that it is restricted to.

    Without a `sandbox_id` only the actor's own rights restrict it. `detail` depends on the kind of
    credential (a terminal's name, a port). `by` identifies who issued it, for `Signers`.
    """

    actor: Actor
    sandbox_id: str = ""
    detail: str = ""
    by: str = ""
    expires_at: datetime | None = None


def plan_of(plans: Mapping[str, Plan], actor: Actor) -> Plan:
    """Return the limits that an actor's organization has."""
    return plans.get(actor.plan, Plan()).changed_by(actor.limits)
