"""Accounts, keys, activity and money as HTTP carries them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, JsonValue

from sandyard.server.api.models import Data, Model, PageMeta, Time
from sandyard.server.core.money import MICROS, Account
from sandyard.server.core.records import (
    Activity,
    ApiKey,
    AutoTopup,
    LedgerEntry,
    Membership,
    Organization,
    Project,
    SshKey,
    User,
)
from sandyard.server.service.billing import Kept, Used

Cents = Annotated[int, Field(ge=-(10**15), le=10**15)]


class MeOut(Model):
    """The user who asks."""

    id: str
    email: str
    first_name: str | None
    last_name: str | None
    profile_picture_url: str | None
    is_admin: bool = Field(description="Whether this user runs the installation.")
    access_granted: bool
    tutorial_completed: bool


def me_out(user: User) -> MeOut:
    """Return the user who asks as it is shown."""
    return MeOut(
        id=user.id,
        email=user.email,
        first_name=user.first_name or (None if user.last_name else user.display_name),
        last_name=user.last_name,
        profile_picture_url=user.picture_url,
        is_admin=user.is_operator,
        access_granted=True,
        tutorial_completed=True,
    )


class OrganizationOut(Model):
    """An organization, and what the one who asks is in it."""

    id: str
    workos_org_id: str | None
    name: str
    slug: str
    plan: str
    enterprise: bool
    role: str
    org_role: str
    settings: dict[str, JsonValue]
    created_at: Time


def organization_out(organization: Organization, role: str) -> OrganizationOut:
    """Return an organization as a member sees it."""
    return OrganizationOut(**_organization(organization, role))


def _organization(organization: Organization, role: str) -> dict[str, Any]:
    return {
        "id": organization.id,
        "workos_org_id": organization.external_id,
        "name": organization.name,
        "slug": organization.slug,
        "plan": organization.plan,
        "enterprise": organization.plan == "enterprise",
        "role": role,
        "org_role": role,
        "settings": dict(organization.settings),
        "created_at": organization.created_at,
    }


class FoundedOut(OrganizationOut):
    """A new organization, and what came with it."""

    default_project_id: str
    personal_workspace_id: str


def founded_out(organization: Organization, *, project_id: str, workspace_id: str) -> FoundedOut:
    """Return a new organization as its founder sees it."""
    return FoundedOut(
        **_organization(organization, "admin"),
        default_project_id=project_id,
        personal_workspace_id=workspace_id,
    )


class CreateOrganization(Model):
    """The body of a new organization."""

    name: str = Field(examples=["Acme"])


class MemberOut(Model):
    """A member of an organization."""

    id: str
    user_id: str
    email: str
    first_name: str | None
    last_name: str | None
    role: Literal["admin", "member"]
    status: Literal["active"]
    joined_at: Time


def member_out(user: User, member: Membership) -> MemberOut:
    """Return a member as other members see them."""
    return MemberOut(
        id=user.id,
        user_id=user.id,
        email=user.email,
        first_name=user.first_name or (None if user.last_name else user.display_name),
        last_name=user.last_name,
        role="admin" if member.role == "admin" else "member",
        status="active",
        joined_at=member.created_at,
    )


class ProjectOut(Model):
    """A project."""

    id: str
    name: str
    slug: str
    color: str
    is_default: bool
    created_at: Time


def project_out(project: Project) -> ProjectOut:
    """Return a project as it is shown."""
    return ProjectOut(
        id=project.id,
        name=project.name,
        slug=project.slug,
        color=project.color,
        is_default=project.is_default,
        created_at=project.created_at,
    )


class CreateProject(Model):
    """The body of a new project."""

    name: str = Field(examples=["Crawler"])
    slug: str | None = None
    color: str | None = Field(None, examples=["#3b82f6"])


class PatchProject(Model):
    """The body of a change: what is left out stays as it is."""

    name: str | None = None
    color: str | None = None


class SuccessOut(Model):
    """It is done."""

    success: Literal[True] = True


# --- keys -------------------------------------------------------------------------------------


class CreateApiKey(Model):
    """The body of a new API key."""

    name: str = Field(examples=["ci"])
    scopes: list[str] = Field([], description="None: everything the creator may.")
    expires_in: str | None = Field(None, examples=["30d", "12m", "1y", "never"])
    is_test: bool = False
    project_id: str | None = None


class PatchApiKey(Model):
    """The body of a change: what is left out stays as it is."""

    name: str | None = None
    scopes: list[str] | None = None
    project_id: str | None = None


class ApiKeyOut(Model):
    """An API key, without its secret."""

    id: str
    name: str
    key_prefix: str
    scopes: list[str]
    project_id: str | None
    expires_at: Time | None
    last_used_at: Time | None
    revoked_at: Time | None
    created_at: Time
    status: Literal["active", "expired", "revoked"]
    is_test: bool
    owner_user_id: str
    owner_display_name: str
    owner_email: str


class NewApiKeyOut(ApiKeyOut):
    """An API key with its secret, which is shown only now."""

    key: str


class NewApiKey(Data[NewApiKeyOut]):
    """The envelope of a secret."""

    message: str = "Store this key securely. You will not be able to see it again."


def api_key_values(
    key: ApiKey, status: Literal["active", "expired", "revoked"]
) -> dict[str, object]:
    """Return what is shown of a key."""
    return {
        "id": key.id,
        "name": key.name,
        "key_prefix": key.prefix,
        "scopes": list(key.scopes),
        "project_id": key.project_id,
        "expires_at": key.expires_at,
        "last_used_at": key.last_used_at,
        "revoked_at": key.revoked_at,
        "created_at": key.created_at,
        "status": status,
        "is_test": key.is_test,
        "owner_user_id": key.owner_user_id,
        "owner_display_name": key.owner_display_name,
        "owner_email": key.owner_email,
    }


class CreateSshKey(Model):
    """The body of a new SSH key."""

    name: str = Field(examples=["laptop"])
    public_key: str = Field(
        validation_alias=AliasChoices("publicKey", "public_key"),
        examples=["ssh-ed25519 AAAAC3… me@laptop"],
    )


class SshKeyOut(Model):
    """An SSH key; some clients look for the names with underscores."""

    id: str
    name: str
    fingerprint: str
    key_type: str
    created_at: Time
    last_used_at: Time | None
    key_type_: str = Field(alias="key_type")
    created_at_: Time = Field(alias="created_at")
    last_used_at_: Time | None = Field(alias="last_used_at")


def ssh_key_out(key: SshKey) -> SshKeyOut:
    """Return an SSH key as it is shown."""
    return SshKeyOut.model_validate(
        {
            "id": key.id,
            "name": key.name,
            "fingerprint": key.fingerprint,
            "keyType": key.key_type,
            "createdAt": key.created_at,
            "lastUsedAt": key.last_used_at,
            "key_type": key.key_type,
            "created_at": key.created_at,
            "last_used_at": key.last_used_at,
        }
    )


# --- activity ---------------------------------------------------------------------------------


class EventOut(Model):
    """One thing that happened."""

    id: str
    org_id: str
    actor_user_id: str | None
    actor_type: str
    resource_type: str
    resource_id: str
    event_type: str
    severity: str
    status: str
    title: str
    summary: str
    attributes: dict[str, JsonValue]
    sandbox_id: str | None
    workspace_id: str | None
    created_at: Time
    thread_id: None = None
    agent_run_id: None = None
    tool_slug: None = None
    installable_agent_install_id: None = None
    runmesh_node_id: None = None
    code_execution_id: None = None


def event_out(line: Activity) -> EventOut:
    """Return a line of the feed as it is shown."""
    return EventOut(
        id=line.id,
        org_id=line.org_id,
        actor_user_id=line.actor_user_id,
        actor_type=line.actor_type,
        resource_type=line.resource_type,
        resource_id=line.resource_id,
        event_type=line.event_type,
        severity=line.severity,
        status=line.status,
        title=line.title,
        summary=line.summary,
        attributes=dict(line.attributes),  # type: ignore[arg-type]  # it was made of JSON values
        sandbox_id=line.sandbox_id,
        workspace_id=line.resource_id if line.resource_type == "workspace" else None,
        created_at=line.created_at,
    )


class EventsOut(Model):
    """A page of what happened."""

    events: list[EventOut]


class EventPage(Model):
    """The envelope of such a page."""

    data: EventsOut
    has_more: bool
    next_cursor: str | None
    meta: PageMeta


# --- money ------------------------------------------------------------------------------------


class PlanOut(Model):
    """The plan of an organization, and what it has."""

    org_id: str
    plan: str
    balance_cents: int
    total_granted_cents: int
    total_used_cents: int
    limits: dict[str, int | None]


class CreditsOut(Model):
    """What an organization has."""

    balance_cents: int
    total_granted_cents: int
    total_used_cents: int
    free_credits_used: bool = Field(description="Whether the credits it began with are used up.")


def credits_out(account: Account, *, is_spent: bool) -> CreditsOut:
    """Return an account as it is shown."""
    return CreditsOut(
        balance_cents=account.balance_cents,
        total_granted_cents=account.granted_cents,
        total_used_cents=account.used_cents,
        free_credits_used=is_spent,
    )


class LedgerEntryOut(Model):
    """One line of the ledger."""

    id: str
    org_id: str
    type: Literal["grant", "topup", "usage", "refund", "adjustment"]
    amount_cents: int
    resource: str | None
    description: str
    reference_id: str | None
    balance_after_cents: int
    created_at: Time


def ledger_entry_out(entry: LedgerEntry) -> LedgerEntryOut:
    """Return a line of the ledger as it is shown."""
    return LedgerEntryOut.model_validate(vars(entry), by_name=True)


class RuntimeOut(Model):
    """What was used of machines. A cent is a million micros."""

    seconds: float
    active_seconds: float = Field(description="Of these, of sandboxes that still run.")
    vcpu_seconds: float
    memory_gib_seconds: float
    cost_micros: int
    cost_cents: int


def runtime_out(used: Used) -> RuntimeOut:
    """Return what was used as it is shown."""
    return RuntimeOut(
        seconds=used.seconds,
        active_seconds=used.active_seconds,
        vcpu_seconds=used.vcpu_seconds,
        memory_gib_seconds=used.memory_mib_seconds / 1024,
        cost_micros=used.micros,
        cost_cents=used.micros // MICROS,
    )


class SandboxRuntimeOut(RuntimeOut):
    """What one sandbox used."""

    sandbox_id: str


class StorageOut(Model):
    """What was kept."""

    byte_seconds: float
    by_kind: dict[str, float] = Field(description="Byte-seconds: sandbox (paused), snapshot.")
    cost_micros: int
    cost_cents: int


def storage_out(kept: Kept) -> StorageOut:
    """Return what was kept as it is shown."""
    return StorageOut(
        byte_seconds=sum(kept.byte_seconds.values()),
        by_kind=dict(kept.byte_seconds),
        cost_micros=kept.micros,
        cost_cents=kept.micros // MICROS,
    )


class UsageOut(Model):
    """What was used in a period. Nothing here is charged for tokens, models or tools."""

    org_id: str
    period: str
    since: Time
    until: Time
    sandbox_runtime: RuntimeOut
    sandboxes: list[SandboxRuntimeOut]
    storage_usage: StorageOut
    tokens: int = 0
    model_usage: tuple[JsonValue, ...] = ()
    tool_executions: tuple[JsonValue, ...] = ()
    resource_charges: tuple[JsonValue, ...] = ()


def sandboxes_out(sandboxes: Mapping[str, Used]) -> list[SandboxRuntimeOut]:
    """Return what each sandbox used, the dearest first."""
    dearest = sorted(sandboxes.items(), key=lambda one: (-one[1].micros, one[0]))
    return [
        SandboxRuntimeOut(sandbox_id=sandbox_id, **runtime_out(used).model_dump(by_alias=False))
        for sandbox_id, used in dearest
    ]


class CostOut(Model):
    """What a sandbox costs."""

    sandbox_id: str
    runtime: RuntimeOut
    storage: StorageOut
    total_micros: int
    total_cents: int
    hourly_micros: int = Field(description="What it costs in an hour as it is now.")
    is_free: bool = Field(description="Whether a test key made it.")


class TopUp(Model):
    """The body of a top-up."""

    amount_cents: int = Field(examples=[2000])
    success_url: str = Field(examples=["https://example.org/thanks"])
    cancel_url: str = Field(examples=["https://example.org/credits"])


class CheckoutOut(Model):
    """Where to pay."""

    checkout_url: str
    session_id: str


class PutAutoTopup(Model):
    """The body of a change; amounts that are left out stay as they are."""

    enabled: bool
    threshold_cents: int | None = None
    topup_amount_cents: int | None = None


class AutoTopupOut(Model):
    """How the balance is filled up by itself."""

    enabled: bool
    threshold_cents: int
    topup_amount_cents: int
    has_saved_payment_method: bool
    last_topup_at: Time | None


def auto_topup_out(wish: AutoTopup) -> AutoTopupOut:
    """Return how the balance is filled up as it is shown."""
    return AutoTopupOut(
        enabled=wish.is_enabled,
        threshold_cents=wish.threshold_cents,
        topup_amount_cents=wish.amount_cents,
        has_saved_payment_method=wish.customer_id is not None,
        last_topup_at=wish.last_at,
    )


class Grant(Model):
    """The body of a grant."""

    amount_cents: int = Field(examples=[5000])
    org_id: str | None = Field(None, description="Default: the organization of who asks.")
    description: str = "Granted by the operator"
    reference_id: str | None = Field(
        None, description="With one, the grant is made once, however often it is asked for."
    )


class Received(Model):
    """The event was received; `credited` says whether it changed an account."""

    received: Literal[True] = True
    credited: bool
