"""Session tokens: users and organizations are created at their first sign-in."""

import logging
from dataclasses import replace
from datetime import datetime

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.people import Session, Sessions
from sandyard.server.core.contracts.store import Store, Transaction, Turn
from sandyard.server.core.errors import InvalidTokenError, NotFoundError
from sandyard.server.core.ids import new_uuid
from sandyard.server.core.records import Membership, Organization, Role, User
from sandyard.server.core.scopes import ADMINS_ONLY, SCOPES
from sandyard.server.service.actor import Actor
from sandyard.server.service.lines import line
from sandyard.server.service.people.organizations import SignUp, found_organization, join, set_role

log = logging.getLogger(__name__)

_EVERYTHING = frozenset({"*"})
_MADE_UP = "@users.invalid"


class SignIn:
    """Turns session tokens into actors.

    `admin_roles` are the provider's roles that make an admin. The stored role counts; a token
    changes it only if it was issued after the role was last set, so that a demoted user cannot use
    an old token.
    """

    def __init__(
        self,
        *,
        store: Store,
        sessions: Sessions,
        clock: Clock,
        sign_up: SignUp,
        admin_roles: frozenset[str],
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._clock = clock
        self._sign_up = sign_up
        self._admin_roles = admin_roles

    async def enter(self, token: str, *, org_id: str | None = None) -> Actor:
        """Return the actor of a session token.

        Raises:
            InvalidTokenError: see core.contracts.people.Sessions.
            TokenExpiredError: the same.
            UnavailableError: the same.
            NotFoundError: the user is in no organization with that id.
        """
        session = await self._sessions.read(token)
        async with self._store.read() as tx:
            found = await self._known(tx, session, org_id)
        if found is None:
            async with self._store.write(Turn.ALONE) as tx:
                found = await self._known(tx, session, org_id) or await self._welcome(
                    tx, session, org_id
                )
        user, organization, member = found
        return Actor(
            org_id=organization.id,
            user_id=user.id,
            role=member.role,
            scopes=_scopes(session, member.role),
            kind="user",
            is_bound=session.org is not None,
            is_operator=user.is_operator,
            plan=organization.plan,
            limits=organization.limits,
        )

    async def _known(
        self, tx: Transaction, session: Session, org_id: str | None
    ) -> tuple[User, Organization, Membership] | None:
        """Return the user and membership, if nothing has to be written."""
        user = await tx.users.find(external_id=session.subject)
        if user is None:
            return None
        theirs = await tx.users.organizations_of(user.id)
        wanted = [
            (organization, member)
            for organization, member in theirs
            if (session.org is None or organization.external_id == session.org)
            and (org_id is None or organization.id == org_id)
        ]
        if not wanted:
            if theirs and org_id is not None and (session.org is None or _is_in(theirs, session)):
                raise NotFoundError("cannot find the organization: check {field}", field="org_id")
            return None
        organization, member = wanted[0]
        is_stale = self._new_role(session, member) is not None
        return None if is_stale else (user, organization, member)

    async def _welcome(
        self, tx: Transaction, session: Session, org_id: str | None
    ) -> tuple[User, Organization, Membership]:
        now = self._clock.now()
        user = await self._user(tx, session, now)
        organization = await self._organization(tx, session, user, now)
        if org_id is not None and organization.id != org_id:
            raise NotFoundError("cannot find the organization: check {field}", field="org_id")
        member = await tx.users.member(organization.id, user.id)
        if member is None:
            removed_at = await tx.users.removed_at(organization.id, user.id)
            if removed_at is not None and session.issued_at <= removed_at:
                raise InvalidTokenError(
                    "cannot accept the session token: its user was removed from the organization"
                )
            await join(tx, organization.id, user, self._role(session) or "member", at=now)
            await tx.activity.append(
                line(
                    "member.joined",
                    "Member joined",
                    org_id=organization.id,
                    actor=None,
                    resource_id=user.id,
                    at=now,
                    summary=user.email,
                )
            )
        elif (role := self._new_role(session, member)) is not None:
            await set_role(tx, member, role, actor=None, at=session.issued_at)
        found = await tx.users.member(organization.id, user.id)
        assert found is not None
        return user, organization, found

    async def _user(self, tx: Transaction, session: Session, now: datetime) -> User:
        user = await tx.users.find(external_id=session.subject)
        if user is not None:
            return user
        # An address that the provider has not verified may belong to another person.
        email = session.email.lower() if session.email and session.is_email_verified else None
        if email is not None and email.endswith(_MADE_UP):
            email = None
        same = await tx.users.find(email=email) if email is not None else None
        if same is not None and same.external_id is None and not same.is_operator:
            # The provider vouches for the address, so it is the one whom an operator put here.
            user = replace(same, external_id=session.subject)
            await tx.users.replace(user)
            for organization, _ in await tx.users.organizations_of(user.id):
                await tx.activity.append(
                    line(
                        "member.signed_in_first",
                        "Member signed in for the first time",
                        org_id=organization.id,
                        actor=None,
                        resource_id=user.id,
                        at=now,
                        summary=user.email,
                    )
                )
            return user
        user_id = new_uuid()
        name = " ".join(one for one in (session.first_name, session.last_name) if one)
        user = User(
            id=user_id,
            email=email if email is not None and same is None else f"{user_id}{_MADE_UP}",
            display_name=name or session.email or session.subject,
            created_at=now,
            external_id=session.subject,
            first_name=session.first_name,
            last_name=session.last_name,
            picture_url=session.picture_url,
        )
        await tx.users.add(user)
        return user

    async def _organization(
        self, tx: Transaction, session: Session, user: User, now: datetime
    ) -> Organization:
        theirs = await tx.users.organizations_of(user.id)
        if session.org is not None:
            known = await tx.organizations.find_external(session.org)
            if known is not None:
                return known
        elif theirs:
            return theirs[0][0]
        name = session.org_name or (
            f"{user.display_name[:80]}'s organization" if session.org is None else session.org[:100]
        )
        founded = await found_organization(
            tx,
            name,
            user,
            sign_up=self._sign_up,
            at=now,
            # The first member of an organization becomes its owner, unless configured otherwise.
            role=self._role(session) or "admin",
            external_id=session.org,
            is_granted=not theirs,
        )
        log.info("created an organization for a session", extra={"org_id": founded.organization.id})
        return founded.organization

    def _role(self, session: Session) -> Role | None:
        """Return the role that a token gives its user in the organization that it names.

        A token without an organization says nothing about roles.
        """
        if session.role is None or session.org is None:
            return None
        return "admin" if session.role in self._admin_roles else "member"

    def _new_role(self, session: Session, member: Membership) -> Role | None:
        role = self._role(session)
        if role is None or role == member.role or session.issued_at <= member.role_at:
            return None
        return role


def _is_in(theirs: list[tuple[Organization, Membership]], session: Session) -> bool:
    return any(organization.external_id == session.org for organization, _ in theirs)


def _scopes(session: Session, role: Role) -> frozenset[str]:
    """Return the scopes of a session: its token's permissions, if they include some of ours.

    Permissions for other programs are ignored; an empty list is not.
    """
    if session.permissions is None:
        return _EVERYTHING
    named = frozenset(session.permissions) & SCOPES
    if session.permissions and not named:
        return _EVERYTHING
    return named if role == "admin" else named - ADMINS_ONLY
