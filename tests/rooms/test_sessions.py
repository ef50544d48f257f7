"""Session tokens of an identity provider: a real server, real keys, real signatures."""

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from tests.support.house import Yard, open_yard
from tests.support.identity import AUDIENCE, IdentityProvider, identity_provider
from tests.support.ports import free_port

from sandyard.server.app.settings import SessionSettings
from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.errors import (
    InvalidTokenError,
    SandyardError,
    TokenExpiredError,
    UnavailableError,
)
from sandyard.server.core.ids import new_uuid
from sandyard.server.core.records import User
from sandyard.server.links.sessions import JwtSessions, Provider
from sandyard.server.service.people.organizations import set_role


class HandClock:
    """A clock that a test moves on."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def now(self) -> datetime:
        return datetime.fromtimestamp(time.time() + self.ahead, UTC)

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)

    def timeout(self, seconds: float) -> asyncio.Timeout:
        return asyncio.timeout(seconds)


@pytest.fixture
def provider() -> Iterator[IdentityProvider]:
    with identity_provider(free_port()) as running:
        yield running


def reader(provider: IdentityProvider, **changes: Any) -> tuple[JwtSessions, HandClock]:
    clock = HandClock()
    settings = {"issuer": provider.issuer, "audience": AUDIENCE, **changes}
    return JwtSessions(Provider(**settings), clock), clock


@asynccontextmanager
async def opened(home: Path, provider: IdentityProvider, **more: Any) -> AsyncIterator[Yard]:
    sections = {
        "sessions": {
            "provider": "oidc", "issuer": provider.issuer, "audience": AUDIENCE, **more,
        },
        "accounts": {"failed_logins_per_minute": 10_000},
    }  # fmt: skip
    async with open_yard(home, sections=sections) as yard:
        yield yard


# --- tokens ---------------------------------------------------------------------------------------


async def test_a_good_token_says_who_it_is(provider: IdentityProvider) -> None:
    sessions, _ = reader(provider)
    said = await sessions.read(
        provider.token(
            org_id="org_1", role="admin", permissions=["sandbox:read", 7], email="a@b.c",
            email_verified=True, given_name="Ada", family_name="L", org_name="Acme",
        )
    )  # fmt: skip
    assert (said.subject, said.org, said.role, said.email) == ("user_1", "org_1", "admin", "a@b.c")
    assert said.permissions == ("sandbox:read",)
    assert (said.is_email_verified, said.first_name, said.org_name) == (True, "Ada", "Acme")
    # Keys are fetched once for any number of tokens.
    for _ in range(5):
        await sessions.read(provider.token())
    assert provider.asked == 1


def none_token(provider: IdentityProvider) -> str:
    _, body, _ = provider.token().split(".")
    made = base64.urlsafe_b64encode(json.dumps({"alg": "none", "kid": "one"}).encode())
    return f"{made.decode().rstrip('=')}.{body}."


def confused_token(provider: IdentityProvider) -> str:
    """Signed with the public key as if that were a shared secret."""
    public = (
        provider.keys["one"]
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    head = base64.urlsafe_b64encode(json.dumps({"alg": "HS256", "kid": "one"}).encode())
    body = provider.token().split(".")[1].encode()
    signed = head.rstrip(b"=") + b"." + body
    mark = base64.urlsafe_b64encode(hmac.new(public, signed, hashlib.sha256).digest())
    return (signed + b"." + mark.rstrip(b"=")).decode()


NOW = int(time.time())
STRANGE = rsa.generate_private_key(65537, 2048)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda p: p.token(iss="https://evil.example"), InvalidTokenError),
        (lambda p: p.token(iss=p.issuer + "/"), InvalidTokenError),
        (lambda p: p.token(aud="another"), InvalidTokenError),
        (lambda p: p.token(aud=None), InvalidTokenError),
        (lambda p: p.token(exp=int(time.time()) - 31), TokenExpiredError),
        (lambda p: p.token(exp=None), InvalidTokenError),
        (lambda p: p.token(exp=10**400), InvalidTokenError),
        (lambda p: p.token(exp="soon"), InvalidTokenError),
        (lambda p: p.token(iat=int(time.time()) + 60), InvalidTokenError),
        (lambda p: p.token(iat=None), InvalidTokenError),
        (lambda p: p.token(nbf=int(time.time()) + 60), InvalidTokenError),
        (lambda p: p.token(sub=None), InvalidTokenError),
        (lambda p: p.token(sub=""), InvalidTokenError),
        (lambda p: p.token(sub="x" * 300), InvalidTokenError),
        (lambda p: p.token(sub="a\nb"), InvalidTokenError),
        (lambda p: p.token(org_id=["a"]), InvalidTokenError),
        (lambda p: p.token(kid=None), InvalidTokenError),
        (lambda p: p.token(key=STRANGE), InvalidTokenError),
        (lambda p: p.token(alg="RS512"), InvalidTokenError),
        (lambda p: p.token(kid="two", key=STRANGE), InvalidTokenError),
        (none_token, InvalidTokenError),
        (confused_token, InvalidTokenError),
        (lambda p: "eyJ", InvalidTokenError),
        (lambda p: "eyJhbGciOiJSUzI1NiJ9..", InvalidTokenError),
        (lambda p: p.token()[:-8] + "AAAAAAAA", InvalidTokenError),
    ],
)  # fmt: skip
async def test_a_token_that_is_no_good_is_refused(
    provider: IdentityProvider, make: Any, error: type[SandyardError]
) -> None:
    sessions, _ = reader(provider)
    with pytest.raises(error, match="cannot accept the session token"):
        await sessions.read(make(provider))


async def test_clocks_may_differ_a_little(provider: IdentityProvider) -> None:
    sessions, _ = reader(provider)
    now = int(time.time())
    differing: list[dict[str, Any]] = [{"exp": now - 20}, {"iat": now + 20}, {"nbf": now + 20}]
    for claims in differing:
        await sessions.read(provider.token(**claims))


async def test_a_new_key_is_looked_for_and_not_too_often(provider: IdentityProvider) -> None:
    sessions, clock = reader(provider)
    await sessions.read(provider.token())
    provider.add("two")
    clock.ahead = 31
    await sessions.read(provider.token(kid="two"))
    assert provider.asked == 2
    # Made-up names do not have the provider asked all day.
    for number in range(20):
        with pytest.raises(InvalidTokenError):
            await sessions.read(provider.token(kid=f"made up {number}", key=STRANGE))
    assert provider.asked == 2
    clock.ahead = 62
    await asyncio.gather(
        *(sessions.read(provider.token(kid="x", key=STRANGE)) for _ in range(9)),
        return_exceptions=True,
    )
    assert provider.asked == 3


async def test_known_keys_go_on_being_good_while_the_provider_is_down(
    provider: IdentityProvider,
) -> None:
    sessions, clock = reader(provider)
    await sessions.read(provider.token())
    provider.is_down = True
    clock.ahead = 24 * 3600.0
    later = int(clock.now().timestamp())
    await sessions.read(provider.token(iat=later, exp=later + 60))
    # One that never reached it says that it is not the token's fault.
    fresh, _ = reader(provider)
    with pytest.raises(UnavailableError):
        await fresh.read(provider.token())


async def test_es256_is_taken_where_it_is_allowed(provider: IdentityProvider) -> None:
    provider.add("curve", kind="ES256")
    token = provider.token(kid="curve", alg="ES256")
    sessions, _ = reader(provider)
    with pytest.raises(InvalidTokenError):
        await sessions.read(token)
    sessions, _ = reader(provider, algorithms=("RS256", "ES256"))
    assert (await sessions.read(token)).subject == "user_1"


async def test_a_shared_secret_in_the_list_of_keys_signs_nothing(
    provider: IdentityProvider,
) -> None:
    secret = base64.urlsafe_b64encode(b"s" * 32).decode().rstrip("=")
    provider.extra = [
        {"kty": "oct", "k": secret, "kid": "shared", "alg": "RS256", "use": "sig"},
        {"kty": "RSA", "kid": "broken"}, {"kid": 7}, {},
    ]  # fmt: skip
    sessions, _ = reader(provider, algorithms=("RS256",))
    token = jwt.encode(
        {"iss": provider.issuer, "aud": AUDIENCE, "sub": "x", "iat": 1, "exp": 2**40},
        b"s" * 32, algorithm="HS256", headers={"kid": "shared"},
    )  # fmt: skip
    with pytest.raises(InvalidTokenError):
        await sessions.read(token)
    assert (await sessions.read(provider.token())).subject == "user_1"


async def test_workos_is_known_by_the_beginning_of_its_issuer(provider: IdentityProvider) -> None:
    sessions, _ = reader(
        provider, issuer="https://api.workos.com/", is_issuer_prefix=True, audience=None,
        keys_url=f"{provider.issuer}/keys",
    )  # fmt: skip
    issuer = "https://api.workos.com/user_management/client_1"
    assert (await sessions.read(provider.token(iss=issuer, aud=None))).subject == "user_1"
    for other in ("https://api.workos.com.evil.example/", "http://api.workos.com/"):
        with pytest.raises(InvalidTokenError):
            await sessions.read(provider.token(iss=other))


# --- who comes in ---------------------------------------------------------------------------------


async def test_whoever_comes_first_is_made_with_their_organization(
    tmp_path: Path, provider: IdentityProvider
) -> None:
    async with opened(tmp_path, provider) as yard:
        token = provider.token(org_id="org_1", org_name="Acme", email="Ada@example.org",
                               email_verified=True, given_name="Ada", family_name="L")  # fmt: skip
        async with yard.client_of(token) as client:
            answers = await asyncio.gather(*(client.get("/v1/me") for _ in range(10)))
            assert {one.status_code for one in answers} == {200}
            assert len({one.json()["data"]["id"] for one in answers}) == 1
            me = answers[0].json()["data"]
            assert (me["email"], me["firstName"], me["isAdmin"]) == (
                "ada@example.org",
                "Ada",
                False,
            )
            org = (await client.get("/v1/organizations/current")).json()["data"]
            assert (org["name"], org["workosOrgId"], org["role"]) == ("Acme", "org_1", "admin")
            assert (await client.get("/v1/billing/credits")).json()["data"][
                "balanceCents"
            ] == 10_000
            box = (await client.post("/v1/sandboxes", json={})).json()["data"]
            assert box["ownerEmail"] == "ada@example.org"
        # The next one of the organization is a member, and sees what is theirs.
        second = provider.token(sub="user_2", org_id="org_1", role="member")
        async with yard.client_of(second) as client:
            assert (await client.get(f"/v1/sandboxes/{box['id']}")).status_code == 404
            current = (await client.get("/v1/organizations/current")).json()["data"]
            assert (current["id"], current["role"]) == (org["id"], "member")
        # Another organization of the same provider is another organization here.
        third = provider.token(sub="user_3", org_id="org_2", role="admin")
        async with yard.client_of(third) as client:
            assert (await client.get(f"/v1/sandboxes/{box['id']}")).status_code == 404
            assert (await client.get("/v1/sandboxes?all=true")).json()["data"] == []


async def test_a_token_without_organization_is_for_ones_own(
    tmp_path: Path, provider: IdentityProvider
) -> None:
    async with opened(tmp_path, provider) as yard:
        async with yard.client_of(provider.token(given_name="Ada")) as client:
            own = (await client.get("/v1/organizations/current")).json()["data"]
            assert own["name"] == "Ada's organization"
            made = (await client.post("/v1/organizations", json={"name": "More"})).json()["data"]
            # A session is its user, who is in both, and says which it means.
            assert (await client.get(f"/v1/organizations/{made['id']}")).status_code == 200
            query = {"orgId": made["id"]}
            current = (await client.get("/v1/organizations/current", params=query)).json()["data"]
            assert current["id"] == made["id"]
            assert (await client.get("/v1/me", params={"orgId": new_uuid()})).status_code == 404
        async with yard.client_of(provider.token(sub="user_2")) as client:
            assert (await client.get("/v1/me", params=query)).status_code == 404


@pytest.mark.parametrize("claimed", ["admin", "member"])
async def test_a_role_without_an_organization_changes_no_membership(
    tmp_path: Path, provider: IdentityProvider, claimed: str
) -> None:
    async with opened(tmp_path, provider) as yard:
        # In one organization an admin, in the other a member.
        ids, roles = {}, {"org_1": "admin", "org_2": "member"}
        async with yard.client_of(provider.token(sub="first", org_id="org_2", role="admin")):
            pass
        for org, role in roles.items():
            async with yard.client_of(provider.token(org_id=org, role=role)) as client:
                current = (await client.get("/v1/organizations/current")).json()["data"]
                ids[org] = current["id"]
                assert current["role"] == role
        later = provider.token(role=claimed, iat=int(time.time()) + 5)
        async with yard.client_of(later) as client:
            for org, role in roles.items():
                query = {"orgId": ids[org]}
                answer = await client.get("/v1/organizations/current", params=query)
                assert answer.status_code == 200, answer.text
                assert answer.json()["data"]["role"] == role


async def test_a_verified_address_is_who_was_here_before_and_another_is_not(
    tmp_path: Path, provider: IdentityProvider
) -> None:
    async with opened(tmp_path, provider) as yard:
        known = User(new_uuid(), "ada@example.org", "Ada", datetime.now(UTC))
        async with yard.house.store.write(Turn.ALONE) as tx:
            await tx.users.add(known)
        claims = {"email": "ada@example.org"}
        async with yard.client_of(provider.token(sub="thief", **claims)) as client:
            me = (await client.get("/v1/me")).json()["data"]
            assert me["id"] != known.id
            assert me["email"] == f"{me['id']}@users.invalid"
        token = provider.token(sub="ada", email_verified=True, **claims)
        async with yard.client_of(token) as client:
            assert (await client.get("/v1/me")).json()["data"]["id"] == known.id
        token = provider.token(sub="later", email_verified=True, **claims)
        async with yard.client_of(token) as client:
            assert (await client.get("/v1/me")).json()["data"]["id"] != known.id


async def test_permissions_of_a_token_bound_it(tmp_path: Path, provider: IdentityProvider) -> None:
    async with opened(tmp_path, provider) as yard:
        token = provider.token(org_id="o", role="member",
                               permissions=["sandbox:read", "admin:*", "widgets:edit"])  # fmt: skip
        async with yard.client_of(token) as client:
            assert (await client.get("/v1/sandboxes")).status_code == 200
            assert (await client.post("/v1/sandboxes", json={})).status_code == 403
            assert (await client.get("/v1/sandboxes?all=true")).status_code == 403
        # Permissions that mean nothing here say nothing.
        async with yard.client_of(provider.token(permissions=["widgets:edit"])) as client:
            assert (await client.post("/v1/sandboxes", json={})).status_code == 201


async def test_who_is_demoted_while_holding_a_session_is_a_member_at_once(
    tmp_path: Path, provider: IdentityProvider
) -> None:
    async with opened(tmp_path, provider) as yard:
        token = provider.token(org_id="o", role="admin")
        async with yard.client_of(token) as client:
            assert (await client.get("/v1/organizations/current")).json()["data"]["role"] == "admin"
            async with yard.house.store.write(Turn.ALONE) as tx:
                organization = await tx.organizations.find_external("o")
                assert organization is not None
                ((_, member),) = await tx.users.members(organization.id)
                await set_role(tx, member, "member", actor=None, at=datetime.now(UTC))
            for _ in range(2):
                current = (await client.get("/v1/organizations/current")).json()["data"]
                assert current["role"] == "member"
            answer = await client.put("/v1/billing/auto-topup", json={"enabled": True})
            assert answer.status_code == 403
        # A token from after that is the provider's word on it.
        later = provider.token(org_id="o", role="admin", iat=int(time.time()) + 5)
        async with yard.client_of(later) as client:
            assert (await client.get("/v1/organizations/current")).json()["data"]["role"] == "admin"


async def test_a_provider_that_is_down_is_a_503_and_keys_go_on(
    tmp_path: Path, provider: IdentityProvider
) -> None:
    provider.is_down = True
    async with opened(tmp_path, provider) as yard:
        async with yard.client_of(provider.token()) as client:
            answer = await client.get("/v1/me")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert (await yard.client.get("/v1/me")).status_code == 200


@pytest.mark.parametrize(
    "wrong",
    [
        {"provider": "oidc", "issuer": "https://x"},
        {"provider": "oidc", "audience": "x"},
        {"provider": "workos"},
        {"provider": "oidc", "issuer": "http://example.org", "audience": "x"},
    ],
)
def test_settings_that_would_let_anyone_in_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"needs|https"):
        SessionSettings.model_validate(wrong)


async def test_an_address_that_nobody_vouches_for_is_nobodys(
    tmp_path: Path, provider: IdentityProvider
) -> None:
    """What an operator does for an address is never done for whoever merely claims it."""
    async with opened(tmp_path, provider) as yard:
        claims = {"email": "ceo@example.org", "org_id": "o"}
        async with yard.client_of(provider.token(sub="thief", **claims)) as client:
            thief = (await client.get("/v1/me")).json()["data"]
        async with yard.house.store.read() as tx:
            assert await tx.users.find(email="ceo@example.org") is None
        token = provider.token(sub="ceo", email_verified=True, **claims)
        async with yard.client_of(token) as client:
            me = (await client.get("/v1/me")).json()["data"]
        assert (me["email"], me["id"] != thief["id"]) == ("ceo@example.org", True)
        # A made-up address cannot be claimed, and the operator's is not taken over.
        for email in (thief["email"], "admin@localhost"):
            token = provider.token(sub=f"x{email}", email=email, email_verified=True)
            async with yard.client_of(token) as client:
                answer = (await client.get("/v1/me")).json()["data"]
                assert answer["isAdmin"] is False
                assert answer["id"] not in (thief["id"], (await yard.first())[1])


async def test_who_was_removed_does_not_come_back_with_the_old_token(
    tmp_path: Path, provider: IdentityProvider
) -> None:
    async with opened(tmp_path, provider) as yard:
        async with yard.client_of(provider.token(org_id="o", role="admin")) as client:
            org = (await client.get("/v1/organizations/current")).json()["data"]
        token = provider.token(sub="leaver", org_id="o", role="admin")
        async with yard.client_of(token) as client:
            me = (await client.get("/v1/me")).json()["data"]
            async with yard.house.store.write(Turn.ALONE) as tx:
                await tx.users.remove_member(org["id"], me["id"], datetime.now(UTC))
            answer = await client.get("/v1/me")
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_token")
        # The provider lets them in again: that is its word.
        later = provider.token(sub="leaver", org_id="o", role="member", iat=int(time.time()) + 5)
        async with yard.client_of(later) as client:
            assert (await client.get("/v1/organizations/current")).json()["data"][
                "role"
            ] == "member"


@pytest.mark.parametrize("permissions", [[], ["admin:resources"]])
async def test_permissions_that_come_to_nothing_permit_nothing(
    tmp_path: Path, provider: IdentityProvider, permissions: list[str]
) -> None:
    async with opened(tmp_path, provider) as yard:
        token = provider.token(org_id="o", role="member", permissions=permissions)
        async with yard.client_of(token) as client:
            assert (await client.get("/v1/sandboxes")).status_code == 403


async def test_a_token_for_one_organization_is_not_for_another(
    tmp_path: Path, provider: IdentityProvider
) -> None:
    async with opened(tmp_path, provider) as yard:
        ids = {}
        for org in ("a", "b"):
            async with yard.client_of(provider.token(org_id=org, role="admin")) as client:
                ids[org] = (await client.get("/v1/organizations/current")).json()["data"]["id"]
        async with yard.client_of(provider.token(org_id="b", role="admin")) as client:
            for path in (f"/v1/organizations/{ids['a']}", f"/v1/organizations/{ids['a']}/members"):
                assert (await client.get(path)).status_code == 404
            assert (await client.get("/v1/me", params={"orgId": ids["a"]})).status_code == 404


async def test_a_key_of_one_kind_signs_nothing_of_another(provider: IdentityProvider) -> None:
    sessions, _ = reader(provider, algorithms=("RS256", "ES256"))
    head, body, mark = provider.token().split(".")
    made = base64.urlsafe_b64encode(json.dumps({"alg": "ES256", "kid": "one"}).encode())
    with pytest.raises(InvalidTokenError, match="another type"):
        await sessions.read(f"{made.decode().rstrip('=')}.{body}.{mark}")
    assert head


@pytest.mark.parametrize(
    "url",
    ["http://localhost.evil.example/k", "http://127.0.0.1@evil.example/k", "ftp://127.0.0.1/k"],
)
def test_an_address_that_only_looks_local_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="https"):
        SessionSettings.model_validate({"jwks_url": url})
