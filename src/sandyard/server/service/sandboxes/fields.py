"""Validation of a sandbox's fields, for create and change."""

import json
import re
from collections.abc import Mapping

from sandyard.server.core.contracts.store import Transaction
from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.ids import check_json, checked_text, is_uuid
from sandyard.server.core.ops import DEFAULT
from sandyard.server.core.records import Sandbox
from sandyard.server.service.actor import Actor

ENV_NAME = "^[A-Za-z_][A-Za-z0-9_]*$"
"""The pattern of the name of an environment variable."""
ACCOUNT = r"^[^\x00-\x1f\x7f-\x9f]{1,64}$"
"""The pattern of an account in a sandbox: a name or a number, without control characters."""
_ENV_MAX = 64 * 1024
_PATH_MAX = 4096
_WORKSPACE = "/workspace"
_METADATA_MAX = 16 * 1024
_PASSWORD_BYTES = range(8, 73)
_IDLE_TIMEOUT_S = range(604_801)


def check_account(text: str, *, field: str = "user") -> None:
    """Refuse what can be neither the name nor the number of an account.

    Raises:
        InvalidArgumentError: it can be neither.
    """
    checked_text(text, field=field)
    if not re.fullmatch(ACCOUNT, text):
        raise InvalidArgumentError("cannot use {field}: it is a name or a number", field=field)


def user_of(text: str | None) -> str:
    """Return the account of a program; without one it is the template's default.

    Raises:
        InvalidArgumentError: it can be none.
    """
    if text is None:
        return DEFAULT
    check_account(text)
    return text


def cwd_of(text: str | None) -> str:
    """Return a working directory as an absolute path; a relative one is below /workspace, and
    without one it is the template's default.

    Raises:
        InvalidArgumentError: it is empty or too long.
    """
    if text is None:
        return DEFAULT
    checked_text(text, field="cwd")
    if not text or len(text) > _PATH_MAX:
        raise InvalidArgumentError(
            f"cannot use cwd: it must be a path of 1 to {_PATH_MAX} characters", field="cwd"
        )
    return text if text.startswith("/") else f"{_WORKSPACE}/{text}"


def check_idle_timeout(seconds: int) -> None:
    """Refuse an idle timeout that is out of range."""
    if seconds not in _IDLE_TIMEOUT_S:
        raise InvalidArgumentError(
            "cannot use {field}: it must be 0 (never) to 604800 seconds",
            field="idle_timeout",
        )


def check_metadata(metadata: Mapping[str, object]) -> None:
    """Refuse metadata that is too large, or that some databases cannot store."""
    check_json(metadata, field="metadata")
    if len(json.dumps(metadata, ensure_ascii=False).encode("utf-8", "replace")) > _METADATA_MAX:
        raise InvalidArgumentError("cannot keep over 16 KiB of metadata", field="metadata")


def checked_env(env: Mapping[str, str]) -> Mapping[str, str]:
    """Return an environment; refuse what no process can be given."""
    size = 0
    for name, value in env.items():
        checked_text(name, field="env")
        checked_text(value, field="env")
        if not re.fullmatch(ENV_NAME, name):
            raise InvalidArgumentError(
                f"cannot set the variable {name[:80]!r}: a name is letters, digits and _ and "
                "does not start with a digit",
                field="env",
            )
        size += len(name.encode()) + len(value.encode()) + 2
    if size > _ENV_MAX:
        raise InvalidArgumentError("env is too large: the limit is 64 KiB", field="env")
    return dict(env)


def checked_password(password: str) -> str:
    """Return a root password; refuse an invalid one."""
    checked_text(password, field="root_password")
    if len(password.encode()) not in _PASSWORD_BYTES or not password.isprintable():
        raise InvalidArgumentError(
            "cannot use {field}: it needs 8 to 72 bytes of printable characters",
            field="root_password",
        )
    return password


async def project_of(tx: Transaction, actor: Actor, project_id: str | None) -> str:
    """Return the id of a project of the actor's organization, or of the default project for None.

    Raises:
        InvalidArgumentError: there is no such project.
    """
    project = None
    if project_id is None or is_uuid(project_id):
        project = await tx.projects.find(actor.org_id, project_id)
    if project is None:
        raise InvalidArgumentError(
            "cannot use {field}: the organization has no such project", field="project_id"
        )
    return project.id


async def check_project(tx: Transaction, sandbox: Sandbox) -> None:
    """Refuse a project that was deleted since it was looked up."""
    if await tx.projects.find(sandbox.org_id, sandbox.project_id) is None:
        raise InvalidArgumentError(
            "cannot use {field}: the project was just deleted", field="project_id"
        )
