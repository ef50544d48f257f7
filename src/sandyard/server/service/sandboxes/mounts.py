"""Validation of a sandbox's mounts."""

from collections.abc import Sequence

from sandyard.server.core.contracts.node import MountWish
from sandyard.server.core.contracts.store import Store, Transaction
from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.ids import checked_text, is_uuid
from sandyard.server.core.records import Mount, Sandbox
from sandyard.server.service.actor import Actor

MOUNTS_MAX = 16
_ROOT = "/workspace"
_PATH_MAX = 1024
_NAME_MAX = 255


def checked_mounts(actor: Actor, mounts: Sequence[Mount]) -> tuple[Mount, ...]:
    """Return mounts, outer ones first; refuse combinations that are always invalid.

    Raises:
        InvalidArgumentError: there are too many, or paths or modes conflict.
        PermissionDeniedError: the credential lacks the scope for the files.
    """
    if not mounts:
        return ()
    if len(mounts) > MOUNTS_MAX:
        raise InvalidArgumentError(
            f"cannot mount over {MOUNTS_MAX} workspaces in one sandbox", field="mounts"
        )
    actor.require("files:read")
    if not all(one.read_only for one in mounts):
        actor.require("files:write")
    modes: dict[str, bool] = {}
    taken: set[str] = set()
    for number, one in enumerate(mounts):
        field = f"mounts.{number}"
        _check_path(one.path, field=f"{field}.path")
        if one.path in taken:
            raise InvalidArgumentError(
                f"cannot mount two workspaces at {one.path}: give each a path of its own",
                field=f"{field}.path",
            )
        taken.add(one.path)
        if modes.setdefault(one.workspace_id, one.read_only) != one.read_only:
            raise InvalidArgumentError(
                "cannot mount one workspace both read-only and writable in one sandbox: leave one "
                "of the two out",
                field=f"{field}.read_only",
            )
    return tuple(sorted(mounts, key=lambda one: one.path.count("/")))


def _check_path(path: str, *, field: str) -> None:
    checked_text(path, field=field)
    names = path.split("/")[1:]
    is_fine = (
        (path == _ROOT or path.startswith(f"{_ROOT}/"))
        and all(name not in ("", ".", "..") for name in names)
        and path.isprintable()
        and len(path.encode()) <= _PATH_MAX
        and all(len(name.encode()) <= _NAME_MAX for name in names)
    )
    if not is_fine:
        raise InvalidArgumentError(
            f"cannot mount at {path[:80]!r}: a path is /workspace or below, like /workspace/data, "
            "without . or .., double or closing slashes",
            field=field,
        )


async def check_workspaces(tx: Transaction, org_id: str, mounts: Sequence[Mount]) -> None:
    """Refuse workspaces that cannot be mounted.

    Raises:
        InvalidArgumentError: it does not exist, or is a member's personal workspace.
    """
    for number, one in enumerate(mounts):
        field = f"mounts.{number}.workspace_id"
        # By its id, because a slug can be reused.
        is_id = is_uuid(one.workspace_id)
        found = await tx.workspaces.find(org_id, one.workspace_id) if is_id else None
        if found is None or found.id != one.workspace_id:
            raise InvalidArgumentError(
                "cannot mount the workspace: the organization has none with this id; list its "
                "workspaces",
                field=field,
            )
        if found.is_personal:
            raise InvalidArgumentError(
                "cannot mount a personal workspace: copy what you need into one of the "
                "organization's",
                field=field,
            )


async def mount_wishes(store: Store, sandbox: Sandbox) -> tuple[MountWish, ...]:
    """Return the mounts of a sandbox's machine, without deleted workspaces."""
    if not sandbox.mounts:
        return ()
    wishes = []
    async with store.read() as tx:
        for one in sandbox.mounts:
            found = await tx.workspaces.find(sandbox.org_id, one.workspace_id)
            if found is not None:
                wishes.append(MountWish(found.id, one.path, one.read_only, found.quota_bytes))
    return tuple(wishes)


async def still_there(tx: Transaction, org_id: str, mounts: Sequence[Mount]) -> tuple[Mount, ...]:
    """Return a snapshot's mounts whose workspaces still exist."""
    found = [await tx.workspaces.find(org_id, one.workspace_id) for one in mounts]
    return tuple(one for one, there in zip(mounts, found, strict=True) if there is not None)
