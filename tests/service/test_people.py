"""People below HTTP: credentials, keys, organizations and SSH keys, with a driven clock."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import asyncssh
import pytest
from tests.support.desk import Desk, member_of, open_desk

from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.errors import (
    AlreadyExistsError,
    ConflictError,
    InternalError,
    InvalidArgumentError,
    InvalidTokenError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitedError,
    TokenExpiredError,
    UnauthenticatedError,
)
from sandyard.server.core.ids import new_uuid
from sandyard.server.core.records import Role, User
from sandyard.server.service.actor import Actor, Admission
from sandyard.server.service.people.credentials import (
    Credential,
    OneTimeTicket,
    PreviewToken,
    Signature,
    Token,
)
from sandyard.server.service.people.organizations import join

FILE = b"/workspace/a"


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with open_desk(tmp_path) as opened:
        yield opened


async def add_member(desk: Desk) -> Actor:
    user = User(new_uuid(), f"{new_uuid()}@example.org", "Member", desk.clock.now())
    async with desk.control.store.write(Turn.ALONE) as tx:
        await tx.users.add(user)
        await join(tx, desk.actor.org_id, user, "member", at=desk.clock.now())
    return member_of(desk.actor, user.id)


def public_key() -> str:
    return asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode().strip()


# --- credentials --------------------------------------------------------------------------------


async def test_a_key_lets_its_owner_in_until_it_expires(desk: Desk) -> None:
    _, secret = await desk.services.api_keys.create(
        desk.actor, "short", scopes=["sandbox:read"], expires_in="1d"
    )
    found = await desk.services.credentials.verify(Token(secret))
    assert found.actor.user_id == desk.actor.user_id
    assert found.actor.scopes == {"sandbox:read"}
    assert found.sandbox_id == ""
    desk.clock.time += timedelta(days=1, seconds=1)
    with pytest.raises(TokenExpiredError):
        await desk.services.credentials.verify(Token(secret))


@pytest.mark.parametrize("secret", ["rt_live_unknown", "x", "eyJhbGciOi", "ünï", "rt_" * 5000])
async def test_what_is_no_key_is_refused(desk: Desk, secret: str) -> None:
    with pytest.raises(InvalidTokenError):
        await desk.services.credentials.verify(Token(secret))


async def test_no_credential_is_told_apart_from_a_bad_one(desk: Desk) -> None:
    with pytest.raises(UnauthenticatedError) as caught:
        await desk.services.credentials.verify(Token(""))
    assert type(caught.value) is UnauthenticatedError


async def test_a_ticket_opens_one_sandbox_once_within_a_minute(desk: Desk) -> None:
    box = await desk.create()
    terminals, verify = desk.services.terminals, desk.services.credentials.verify
    made = await terminals.issue(desk.actor, box.id)
    with pytest.raises(InvalidTokenError):
        await verify(OneTimeTicket("desktop", made.secret))
    made = await terminals.issue(desk.actor, box.id)
    admission = await verify(OneTimeTicket("terminal", made.secret))
    assert admission.sandbox_id == box.id
    assert admission.actor.scopes == {"sandbox:write"}
    with pytest.raises(InvalidTokenError):
        await verify(OneTimeTicket("terminal", made.secret))
    late = await terminals.issue(desk.actor, box.id)
    desk.clock.time += timedelta(seconds=61)
    with pytest.raises(TokenExpiredError):
        await verify(OneTimeTicket("terminal", late.secret))


async def test_a_preview_token_is_bound_to_its_port_and_sandbox(desk: Desk) -> None:
    box, other = await desk.create(), await desk.create()
    shown = await desk.services.previews.url(desk.actor, box.id, 3000, by_cookie=True)
    token = shown.url.partition("=")[2]
    verify = desk.services.credentials.verify
    for _ in range(2):
        assert (await verify(PreviewToken(token, box.id, 3000))).sandbox_id == box.id
    for sandbox_id, port in ((box.id, 3001), (other.id, 3000)):
        with pytest.raises(InvalidTokenError):
            await verify(PreviewToken(token, sandbox_id, port))


async def test_a_signature_is_bound_to_all_that_was_signed(desk: Desk) -> None:
    box = await desk.create()
    use, signature = await desk.services.signing.sign(desk.actor, box.id, "GET", FILE, "root", 600)
    verify = desk.services.credentials.verify
    assert (await verify(Signature(use, signature))).actor.user_id == desk.actor.user_id
    for changed in (
        replace(use, method="PUT"), replace(use, path=b"/etc/shadow"), replace(use, user="ubuntu"),
        replace(use, expires=use.expires + 1), replace(use, sandbox_id="sandbox-aaaaaaaaaaaa"),
        replace(use, by=f"{desk.actor.org_id}:user:{new_uuid()}"),
    ):  # fmt: skip
        with pytest.raises(InvalidTokenError):
            await verify(Signature(changed, signature))
    desk.clock.time += timedelta(seconds=601)
    with pytest.raises(TokenExpiredError):
        await verify(Signature(use, signature))


async def test_what_a_key_handed_on_ends_with_the_key(desk: Desk) -> None:
    box = await desk.create()
    key, secret = await desk.services.api_keys.create(desk.actor, "k")
    by_key = (await desk.services.credentials.verify(Token(secret))).actor
    use, signature = await desk.services.signing.sign(by_key, box.id, "GET", FILE, "root", 600)
    ticket = await desk.services.terminals.issue(by_key, box.id)
    await desk.services.api_keys.revoke(desk.actor, key.id)
    for credential in (
        Token(secret), Signature(use, signature), OneTimeTicket("terminal", ticket.secret),
    ):  # fmt: skip
        with pytest.raises(InvalidTokenError):
            await desk.services.credentials.verify(credential)


async def test_a_kind_that_nobody_verifies_is_a_bug_and_one_that_is_added_works(
    desk: Desk,
) -> None:
    @dataclass(frozen=True)
    class Badge(Credential):
        role: Role

    credentials = desk.services.credentials
    with pytest.raises(InternalError):
        await credentials.verify(Badge("member"))

    async def verify(badge: Badge) -> Admission:
        return Admission(replace(desk.actor, role=badge.role))

    credentials.add(Badge, verify)
    assert (await credentials.verify(Badge("member"))).actor.role == "member"


# --- keys ---------------------------------------------------------------------------------------


async def test_a_key_grants_no_more_and_lives_no_longer_than_its_maker(desk: Desk) -> None:
    keys = desk.services.api_keys
    _, secret = await keys.create(
        desk.actor, "maker", scopes=["org:write", "sandbox:read"], expires_in="30d"
    )
    maker = (await desk.services.credentials.verify(Token(secret))).actor
    with pytest.raises(PermissionDeniedError) as caught:
        await keys.create(maker, "more", scopes=["sandbox:write"])
    assert caught.value.facts["required_scope"] == "sandbox:write"
    made, _ = await keys.create(maker, "same", scopes=["sandbox:read"], expires_in="1y")
    assert made.expires_at is not None
    assert made.expires_at <= desk.clock.now() + timedelta(days=30)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"scopes": ["none:such"]}, "scopes"),
        ({"expires_in": "soon"}, "expires_in"),
        ({"expires_in": "0d"}, "expires_in"),
        ({"project_id": "x"}, "project_id"),
    ],
)
async def test_a_key_that_cannot_be_is_refused_by_field(
    desk: Desk, changes: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        await desk.services.api_keys.create(desk.actor, "k", **changes)  # type: ignore[arg-type]  # wrong on purpose
    assert caught.value.facts["field"] == field


async def test_a_rotated_key_has_another_secret_and_the_old_one_ends(desk: Desk) -> None:
    key, old = await desk.services.api_keys.create(desk.actor, "k")
    _, new = await desk.services.api_keys.rotate(desk.actor, key.id)
    verify = desk.services.credentials.verify
    assert (await verify(Token(new))).actor.key_id == key.id
    with pytest.raises(InvalidTokenError):
        await verify(Token(old))


async def test_members_have_keys_of_their_own_and_admins_revoke_but_never_rotate_them(
    desk: Desk,
) -> None:
    member, keys = await add_member(desk), desk.services.api_keys
    mine, _ = await keys.create(desk.actor, "admin's")
    theirs, _ = await keys.create(member, "member's")
    assert [one.id for one in await keys.page(member, limit=10, after=None)] == [theirs.id]
    assert {mine.id, theirs.id} <= {
        one.id for one in await keys.page(desk.actor, limit=10, after=None)
    }
    with pytest.raises(NotFoundError):
        await keys.get(member, mine.id)
    with pytest.raises(PermissionDeniedError):
        await keys.rotate(desk.actor, theirs.id)
    assert (await keys.revoke(desk.actor, theirs.id)).revoked_at is not None


# --- organizations, projects --------------------------------------------------------------------


async def test_an_organization_belongs_to_its_founder_and_is_hidden_from_others(
    desk: Desk,
) -> None:
    organizations, member = desk.services.organizations, await add_member(desk)
    unbound = replace(desk.actor, is_bound=False)
    made = await organizations.create(unbound, "Mine")
    assert (await organizations.get(unbound, made.organization.id))[1] == "admin"
    with pytest.raises(NotFoundError):
        await organizations.get(replace(member, is_bound=False), made.organization.id)
    for _ in range(3):
        await organizations.create(unbound, "Another")
    with pytest.raises(ConflictError, match="5"):
        await organizations.create(unbound, "One too many")


async def test_what_is_in_a_deleted_project_is_in_the_default_one(desk: Desk) -> None:
    organizations = desk.services.organizations
    (default,) = await organizations.projects(desk.actor)
    made = await organizations.create_project(desk.actor, "Lab")
    box = await desk.create(project_id=made.id)
    assert (await desk.get(box)).project_id == made.id
    await organizations.delete_project(desk.actor, made.id)
    assert (await desk.get(box)).project_id == default.id
    with pytest.raises(ConflictError):
        await organizations.delete_project(desk.actor, default.id)


# --- SSH keys -----------------------------------------------------------------------------------


async def test_ssh_keys_are_the_organizations_and_a_member_deletes_only_own(desk: Desk) -> None:
    keys, member = desk.services.ssh_keys, await add_member(desk)
    line = public_key()
    mine = await keys.add(desk.actor, "laptop", line)
    with pytest.raises(AlreadyExistsError) as caught:
        await keys.add(member, "the same", line)
    assert caught.value.facts["field"] == "public_key"
    theirs = await keys.add(member, "theirs", public_key())
    assert {one.id for one in await keys.every(member)} == {mine.id, theirs.id}
    with pytest.raises(NotFoundError):
        await keys.delete(member, mine.id)
    box = await desk.create()
    assert set((await desk.get(box)).ssh_key_ids) == {mine.id, theirs.id}
    await keys.delete(desk.actor, mine.id)
    assert set((await desk.get(box)).ssh_key_ids) == {theirs.id}


# --- rates --------------------------------------------------------------------------------------


async def test_an_address_tries_so_many_bad_credentials_a_minute(desk: Desk) -> None:
    rates, allowed = desk.services.rates, 0
    with pytest.raises(RateLimitedError) as caught:
        for _ in range(1000):
            rates.failed("192.0.2.1")
            allowed += 1
    assert allowed == 30
    assert 0 < caught.value.retry_after_s <= 60
    rates.failed("192.0.2.2")
    await desk.clock.advance(61)
    rates.failed("192.0.2.1")
