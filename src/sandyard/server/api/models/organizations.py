"""Users, organizations and members as HTTP carries them."""

from typing import Any, Literal

from pydantic import Field, JsonValue

from sandyard.server.api.models.base import Body, Model, Time, Title
from sandyard.server.core.records import (
    Membership,
    Organization,
    Role,
    User,
)


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


class CreateOrganization(Body):
    """The body of a new organization."""

    name: Title = Field(examples=["Acme"])


class MemberOut(Model):
    """A member of an organization."""

    id: str
    user_id: str
    email: str
    first_name: str | None
    last_name: str | None
    role: Role
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
        role=member.role,
        status="active",
        joined_at=member.created_at,
    )
