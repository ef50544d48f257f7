"""Operations of an installation's operator on its host: organizations, users, keys, credits.

A caller who can run this has access to the database anyway, so no credential is needed. Everything
is recorded in the feed as done by the system.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import Phase
from sandyard.server.core.contracts.store import Store, Transaction, Turn
from sandyard.server.core.egress import NOTHING, Policy, checked
from sandyard.server.core.errors import (
    AlreadyExistsError,
    ConflictError,
    InvalidArgumentError,
    NotFoundError,
)
from sandyard.server.core.ids import checked_text, new_uuid
from sandyard.server.core.money import Account, show
from sandyard.server.core.plans import LIMITS, Plan
from sandyard.server.core.records import (
    ApiKey,
    InUse,
    LedgerEntry,
    Membership,
    Mount,
    Organization,
    Quarantined,
    Reason,
    Role,
    Sandbox,
    Snapshot,
    StoragePeriod,
    User,
)
from sandyard.server.core.states import Status
from sandyard.server.service.actor import Actor
from sandyard.server.service.lines import line
from sandyard.server.service.money.credits import credit
from sandyard.server.service.networks import stamped
from sandyard.server.service.people.api_keys import ApiKeys
from sandyard.server.service.people.organizations import (
    ROLES,
    SignUp,
    check_title,
    found_organization,
    join,
    revoke_all,
    set_role,
)
from sandyard.server.service.people.ssh_keys import withdraw
from sandyard.server.service.sandboxes.mounts import still_there

_EMAIL_MAX = 254
_ADOPTED = {Phase.PAUSED.value: Status.PAUSED, Phase.DEAD.value: Status.ERROR}
"""The status of a sandbox whose machine is in this phase."""


@dataclass(frozen=True)
class Summary:
    """An organization, its balance and usage."""

    organization: Organization
    account: Account
    in_use: InUse
    members: int


class Administration:
    """The operations. Organizations are named by id or slug, users by e-mail address or id."""

    def __init__(
        self, *, store: Store, clock: Clock, sign_up: SignUp, plans: Mapping[str, Plan]
    ) -> None:
        self._store = store
        self._clock = clock
        self._sign_up = sign_up
        self._plans = plans

    async def organizations(self) -> list[Summary]:
        """Return every organization, oldest first."""
        now = self._clock.now()
        async with self._store.read() as tx:
            return [
                Summary(
                    organization=one,
                    account=await tx.credits.account(one.id),
                    in_use=await tx.usage.in_use(one.id, now),
                    members=len(await tx.users.members(one.id)),
                )
                for one in await tx.organizations.every()
            ]

    async def create_organization(self, name: str, email: str) -> tuple[Organization, User]:
        """Create an organization whose first admin has this e-mail address. A new user is created
        if necessary.

        Raises:
            InvalidArgumentError: name or address is invalid.
        """
        name, email = check_title(name, field="name"), _check_email(email)
        now = self._clock.now()
        async with self._store.write(Turn.ALONE) as tx:
            user = await self._user_or_new(tx, email)
            theirs = await tx.users.organizations_of(user.id)
            founded = await found_organization(
                tx, name, user, sign_up=self._sign_up, at=now, is_granted=not theirs
            )
        return founded.organization, user

    async def set_plan(self, reference: str, plan: str) -> Organization:
        """Change an organization's plan.

        Raises:
            InvalidArgumentError: there is no such plan.
            NotFoundError: there is no such organization.
        """
        if plan not in self._plans:
            raise InvalidArgumentError(
                f"cannot use the plan {plan!r}: known are {', '.join(sorted(self._plans))} "
                "(setting plans)"
            )
        async with self._store.write(Turn.ALONE) as tx:
            organization = replace(await _organization(tx, reference), plan=plan)
            await tx.organizations.replace(organization)
            await self._note(tx, organization, "organization.plan_changed", f"Plan is {plan} now")
        return organization

    async def set_limit(self, reference: str, name: str, value: int | None) -> Organization:
        """Override a limit of an organization's plan; None removes the override.

        Raises:
            InvalidArgumentError: there is no such limit, or the value is invalid.
            NotFoundError: there is no such organization.
        """
        # As the settings write it, too.
        name = next((one for one, plain in LIMITS.items() if plain == name), name)
        if name not in LIMITS:
            raise InvalidArgumentError(f"cannot limit {name!r}: {', '.join(LIMITS)} can be limited")
        if value is not None and value < 0:
            raise InvalidArgumentError(f"cannot limit {name} to {value}: it is 0 or more")
        async with self._store.write(Turn.ALONE) as tx:
            organization = await _organization(tx, reference)
            limits = {one: has for one, has in organization.limits.items() if one != name}
            if value is not None:
                limits[name] = value
            organization = replace(organization, limits=limits)
            await tx.organizations.replace(organization)
            await self._note(
                tx, organization, "organization.limits_changed", f"Limit of {name} changed"
            )
        return organization

    async def members(self, reference: str) -> list[tuple[User, Membership]]:
        """Return an organization's members, longest-standing first."""
        async with self._store.read() as tx:
            return await tx.users.members((await _organization(tx, reference)).id)

    async def add_member(self, reference: str, email: str, role: str) -> User:
        """Add a member. A new user is created if the address is unknown.

        Raises:
            AlreadyExistsError: they are a member already.
            InvalidArgumentError: address or role is invalid.
            NotFoundError: there is no such organization.
        """
        email, given = _check_email(email), _checked_role(role)
        async with self._store.write(Turn.ALONE) as tx:
            organization = await _organization(tx, reference)
            user = await self._user_or_new(tx, email)
            if await tx.users.member(organization.id, user.id) is not None:
                raise AlreadyExistsError(f"cannot add {email}: they are a member already")
            await join(tx, organization.id, user, given, at=self._clock.now())
            await self._note(tx, organization, "member.joined", "Member joined", user)
        return user

    async def change_role(self, reference: str, who: str, role: str) -> None:
        """Change a member's role.

        Raises:
            InvalidArgumentError: there is no such role.
            NotFoundError: there is no such organization or member.
        """
        given = _checked_role(role)
        async with self._store.write(Turn.ALONE) as tx:
            organization, _, member = await self._member(tx, reference, who)
            if given != "admin":
                await self._check_not_last(tx, organization, member)
            await set_role(tx, member, given, actor=None, at=self._clock.now())

    async def remove_member(self, reference: str, who: str) -> None:
        """Remove a member and revoke their keys. Their sandboxes stay.

        Raises:
            ConflictError: it is the organization's last admin.
            NotFoundError: there is no such organization or member.
        """
        async with self._store.write(Turn.ALONE) as tx:
            organization, user, member = await self._member(tx, reference, who)
            await self._check_not_last(tx, organization, member)
            now = self._clock.now()
            await revoke_all(tx, member, at=now)
            for key in await tx.ssh_keys.every(organization.id):
                if key.owner_user_id == user.id:
                    await withdraw(tx, key, at=now)
                    await self._note(
                        tx, organization, "ssh_key.deleted", f"SSH key {key.name} deleted", user
                    )
            await tx.users.remove_member(organization.id, user.id, now)
            await self._note(tx, organization, "member.removed", "Member removed", user)

    async def set_operator(self, who: str, *, is_operator: bool) -> User:
        """Make a user an operator, or revoke that.

        Raises:
            NotFoundError: there is no such user.
        """
        async with self._store.write(Turn.ALONE) as tx:
            user = replace(await _user(tx, who), is_operator=is_operator)
            await tx.users.replace(user)
            for organization, _ in await tx.users.organizations_of(user.id):
                title = "Member is an operator now" if is_operator else "Member is no operator now"
                await self._note(tx, organization, "member.operator_changed", title, user)
        return user

    async def keys(self, reference: str) -> list[ApiKey]:
        """Return an organization's keys that are not revoked, newest first."""
        async with self._store.read() as tx:
            organization = await _organization(tx, reference)
            return await tx.keys.page(organization.id, owner_user_id=None, limit=10_000)

    async def create_key(
        self,
        reference: str,
        who: str,
        name: str,
        *,
        scopes: Sequence[str],
        expires_in: str | None,
        is_test: bool,
    ) -> tuple[ApiKey, str]:
        """Create a key for a member. See service.people.api_keys.ApiKeys.create."""
        async with self._store.read() as tx:
            organization, user, member = await self._member(tx, reference, who)
        actor = _system(organization, user, member)
        return await ApiKeys(self._store, self._clock).create(
            actor, name, scopes=scopes, expires_in=expires_in, is_test=is_test
        )

    async def revoke_key(self, reference: str, key_id: str) -> ApiKey:
        """Revoke a key. See service.people.api_keys.ApiKeys.revoke."""
        async with self._store.read() as tx:
            organization = await _organization(tx, reference)
            key = await tx.keys.find(organization.id, key_id)
        owner = key.owner_user_id if key else ""
        actor = Actor(organization.id, owner, "admin", frozenset({"*"}), "system")
        return await ApiKeys(self._store, self._clock).revoke(actor, key_id)

    async def grant(
        self, reference: str, amount_cents: int, *, description: str, reference_id: str | None
    ) -> tuple[LedgerEntry, bool]:
        """Grant credits to an organization; negative amounts are taken away.

        Return the ledger's entry, and whether it is new. With a reference it is made once.
        """
        checked_text(description, field="description")
        async with self._store.write(Turn.ALONE) as tx:
            organization = await _organization(tx, reference)
            entry, is_new = await credit(
                tx,
                organization.id,
                "grant" if amount_cents > 0 else "adjustment",
                amount_cents,
                description=description,
                at=self._clock.now(),
                reference_id=reference_id,
            )
            if is_new:
                title = "Credits granted" if amount_cents > 0 else "Credits taken away"
                await self._note(
                    tx, organization, "billing.grant", f"{title}: {show(abs(amount_cents))}"
                )
        return entry, is_new

    async def quarantine(self) -> list[Quarantined]:
        """Return the machines and snapshots that no row belongs to, the longest there first."""
        async with self._store.read() as tx:
            return await tx.quarantine.all()

    async def adopt(self, wanted_id: str, reference: str, who: str) -> Sandbox | Snapshot:
        """Make a machine in quarantine a paused sandbox of a member again, or a snapshot one of
        theirs. It has no name; a sandbox has no tags, environment or expiry, and is in the default
        project.

        Raises:
            NotFoundError: there is no such machine, snapshot, organization or member.
            ConflictError: it is still being saved, cannot be read, or is being deleted.
        """
        async with self._store.write(Turn.ALONE) as tx:
            found = await _quarantined(tx, wanted_id)
            organization, user, _ = await self._member(tx, reference, who)
            if found.is_unwanted:
                raise ConflictError(f"cannot adopt {wanted_id}: it is being deleted")
            adopt = self._adopt_snapshot if found.kind == "snapshot" else self._adopt_machine
            made = await adopt(tx, found, organization, user)
            await tx.quarantine.remove([wanted_id])
            await tx.activity.append(
                line(
                    "snapshot.adopted" if found.kind == "snapshot" else "sandbox.adopted",
                    "Snapshot adopted" if found.kind == "snapshot" else "Sandbox adopted",
                    org_id=organization.id,
                    actor=None,
                    resource_id=wanted_id,
                    sandbox_id=wanted_id if found.kind == "machine" else None,
                    at=self._clock.now(),
                )
            )
        return made

    async def _adopt_machine(
        self, tx: Transaction, machine: Quarantined, organization: Organization, user: User
    ) -> Sandbox:
        status, now = _ADOPTED.get(machine.phase), self._clock.now()
        if status is None or not machine.template:
            raise ConflictError(
                f"cannot adopt {machine.id}: its machine is {machine.phase} and has to be "
                "saved first; try again in a while"
            )
        project = await tx.projects.find(organization.id, None)
        if project is None:
            raise NotFoundError(f"cannot find a project of {organization.name}")
        mounts = await still_there(tx, organization.id, machine.mounts)
        slug, _, digest = machine.template.partition("@")
        about = await tx.versions.about(organization.id, slug, digest) if digest else None
        return await tx.sandboxes.insert(
            Sandbox(
                id=machine.id,
                org_id=organization.id,
                owner_user_id=user.id,
                project_id=project.id,
                name=None,
                status=status,
                version=machine.version + 1,
                incarnation=machine.incarnation,
                template=machine.template,
                shape=machine.shape,
                idle_timeout_s=0,
                created_at=now,
                updated_at=now,
                node_id=machine.node_id,
                started_at=now,
                paused_at=now,
                network=_rules_of(machine),
                mounts=mounts,
                has_desktop=about is not None and about.kind == "desktop",
                reason=_lost(machine, mounts),
            )
        )

    async def _adopt_snapshot(
        self, tx: Transaction, found: Quarantined, organization: Organization, user: User
    ) -> Snapshot:
        if not found.template:
            raise ConflictError(
                f"cannot adopt {found.id}: it cannot be read; the server's log says why"
            )
        made = Snapshot(
            id=found.id,
            org_id=organization.id,
            owner_user_id=user.id,
            sandbox_id="",  # not known any more
            node_id=found.node_id,
            name=None,
            template=found.template,
            os=found.os,
            shape=found.shape,
            is_ready=True,
            is_hidden=False,
            size_bytes=found.size_bytes,
            created_at=self._clock.now(),
            network=NOTHING,  # its rules are not known any more
        )
        await tx.snapshots.insert(made)
        await tx.storage.open(
            StoragePeriod("snapshot", made.id, organization.id, made.size_bytes, made.created_at)
        )
        return made

    async def condemn(self, wanted_id: str) -> None:
        """Have a machine or snapshot in quarantine removed with its files, within a few minutes.

        Raises:
            NotFoundError: there is no such one.
        """
        async with self._store.write(Turn.ALONE) as tx:
            await _quarantined(tx, wanted_id)
            await tx.quarantine.condemn(wanted_id)

    async def ledger(self, reference: str, *, limit: int) -> list[LedgerEntry]:
        """Return the newest entries of an organization's ledger."""
        async with self._store.read() as tx:
            organization = await _organization(tx, reference)
            return await tx.credits.history(organization.id, limit=limit)

    async def _check_not_last(
        self, tx: Transaction, organization: Organization, member: Membership
    ) -> None:
        """Refuse to leave an organization without an admin."""
        members = await tx.users.members(organization.id)
        admins = [user.id for user, one in members if one.role == "admin"]
        if admins == [member.user_id]:
            raise ConflictError(
                f"cannot do this: {organization.slug} would have no admin; make another one first"
            )

    async def _user_or_new(self, tx: Transaction, email: str) -> User:
        user = await tx.users.find(email=email)
        if user is None:
            user = User(new_uuid(), email, email.partition("@")[0], self._clock.now())
            await tx.users.add(user)
        return user

    async def _member(
        self, tx: Transaction, reference: str, who: str
    ) -> tuple[Organization, User, Membership]:
        organization, user = await _organization(tx, reference), await _user(tx, who)
        member = await tx.users.member(organization.id, user.id)
        if member is None:
            raise NotFoundError(f"cannot find {who} among the members of {organization.name}")
        return organization, user, member

    async def _note(
        self,
        tx: Transaction,
        organization: Organization,
        event: str,
        title: str,
        user: User | None = None,
    ) -> None:
        await tx.activity.append(
            line(
                event,
                title,
                org_id=organization.id,
                actor=None,
                resource_id=user.id if user else organization.id,
                at=self._clock.now(),
                summary=user.email if user else "",
            )
        )


def _system(organization: Organization, user: User, member: Membership) -> Actor:
    return Actor(
        organization.id, user.id, member.role, frozenset({"*"}), "system", plan=organization.plan
    )


async def _quarantined(tx: Transaction, wanted_id: str) -> Quarantined:
    for one in await tx.quarantine.all():
        if one.id == wanted_id:
            return one
    raise NotFoundError(
        f"cannot find {wanted_id} in quarantine: `sandyard admin quarantine list` lists what is"
    )


async def _organization(tx: Transaction, reference: str) -> Organization:
    for one in await tx.organizations.every():
        if reference in (one.id, one.slug):
            return one
    raise NotFoundError(
        f"cannot find the organization {reference!r}: `sandyard admin org list` lists ids and slugs"
    )


async def _user(tx: Transaction, who: str) -> User:
    user = await tx.users.find(email=who.lower()) or await tx.users.find(user_id=who)
    if user is None:
        raise NotFoundError(f"cannot find the user {who!r}: name the e-mail address or the id")
    return user


def _check_email(email: str) -> str:
    checked_text(email, field="email")
    name, at, host = email.rpartition("@")
    if not (name and at and host) or len(email) > _EMAIL_MAX or not email.isprintable():
        raise InvalidArgumentError(f"cannot use {email!r}: it is no e-mail address", field="email")
    return email.lower()


def _checked_role(role: str) -> Role:
    for one in ROLES:
        if role == one:
            return one
    raise InvalidArgumentError(f"cannot use the role {role!r}: {' and '.join(ROLES)} are there")


def _rules_of(machine: Quarantined) -> Policy:
    """Return the network rules that a machine had. Its node does not keep the headers that were
    injected; their hosts remain inspected."""
    if machine.network is None:
        return NOTHING
    hosts = (one.host for one in machine.network.inject)
    inspect = tuple(dict.fromkeys((*machine.network.inspect, *hosts)))
    try:
        return stamped(checked(replace(machine.network, inspect=inspect, inject=())))
    except InvalidArgumentError:  # its node may be hostile
        return NOTHING


def _lost(machine: Quarantined, mounts: Sequence[Mount]) -> Reason | None:
    """Return what an adopted sandbox has lost, if anything."""
    lost = []
    if machine.network is None:
        lost.append("its network rules are not known: it reaches nothing until it is given some")
    elif machine.network.inject:
        lost.append("the headers that its network rules injected are lost: set them again")
    if gone := len(machine.mounts) - len(mounts):
        lost.append(f"{gone} of its workspaces do not exist here and are not mounted")
    return Reason("adopted_in_part", "; ".join(lost)) if lost else None
