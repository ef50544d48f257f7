"""Scopes: what a credential may do, and when one scope covers another."""

from collections.abc import Iterable

SCOPES = frozenset(
    {
        "sandbox:create", "sandbox:read", "sandbox:write", "sandbox:*",
        "files:read", "files:write", "files:*",
        "org:read", "org:write", "org:members", "org:*",
        "agent:run", "agent:read", "agent:write", "agent:*",
        "workflow:*", "tool:*", "ssh-key:*", "activity:read",
        "template:read", "template:write", "template:*",
        "secret:read", "secret:write", "secret:use", "secret:*",
        "admin:resources", "admin:*", "*",
    }
)  # fmt: skip
"""Every scope that a key may hold. Agent, workflow and tool scopes are kept and used by nothing."""


ADMINS_ONLY = frozenset({"admin:resources", "admin:*"})
"""Held by name or not at all: `*` does not cover these, and only an admin grants them."""


def is_covered(scope: str, held: Iterable[str]) -> bool:
    """Tell whether a set of held scopes allows `scope`: itself, its `family:*`, or `*`."""
    family = scope.split(":", 1)[0] + ":*"
    return any(one in ("*", scope, family) for one in held)
