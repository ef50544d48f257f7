"""Where requests to the E2B API carry their credential."""

import base64
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from starlette.requests import HTTPConnection

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.errors import InvalidTokenError, TokenExpiredError
from sandyard.server.e2b.names import Target
from sandyard.server.service.actor import Admission
from sandyard.server.service.builds.uploads import Permit, Uploads
from sandyard.server.service.people.credentials import Credential, Credentials, Token
from sandyard.server.service.sandboxes.tokens import SandboxTokens

_UPLOAD = re.compile(r"/templates/([a-z0-9-]{1,63})/files/([0-9a-f]{64})")
FindTarget = Callable[[HTTPConnection], Target]
_OPERATIONS = {"GET": "read", "HEAD": "read", "POST": "write"}
_EXPIRY = re.compile(r"[0-9]{1,12}")


@dataclass(frozen=True)
class AccessToken(Credential):
    """The token for processes and files of one sandbox."""

    sandbox_id: str
    secret: str


@dataclass(frozen=True)
class FileSignature(Credential):
    """The signature of a URL of one file. Clients make it of the access token themselves."""

    sandbox_id: str
    path: str
    operation: str
    user: str
    expires: str | None
    signature: str


@dataclass(frozen=True)
class UploadSignature(Credential):
    """The signature of a URL to upload files for builds."""

    permit: Permit
    signature: str


def api_key(connection: HTTPConnection) -> Token | None:
    """Return the API key in the headers."""
    key = connection.headers.get("x-api-key")
    if key is None:
        scheme, _, token = connection.headers.get("authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" and token.strip() else None
    return None if key is None else Token(key)


def upload_signature(connection: HTTPConnection) -> UploadSignature | None:
    """Return the signature of a URL to upload files."""
    query = connection.query_params
    found = _UPLOAD.fullmatch(connection.scope["path"])
    if found is None or connection.scope.get("method") != "PUT" or "signature" not in query:
        return None
    expires = query.get("expires", "")
    at = int(expires) if _EXPIRY.fullmatch(expires) else 0
    return UploadSignature(Permit(found[1], found[2], query.get("by", ""), at), query["signature"])


def access_token(target_of: FindTarget) -> Callable[[HTTPConnection], AccessToken | None]:
    """Return what reads the access token of the sandbox that a request is for."""

    def read(connection: HTTPConnection) -> AccessToken | None:
        secret = connection.headers.get("x-access-token")
        return None if not secret else AccessToken(target_of(connection).sandbox_id, secret)

    return read


def file_signature(target_of: FindTarget) -> Callable[[HTTPConnection], FileSignature | None]:
    """Return what reads the signature of a URL of a file."""

    def read(connection: HTTPConnection) -> FileSignature | None:
        query = connection.query_params
        operation = _OPERATIONS.get(connection.scope.get("method", ""))
        is_for_file = connection.scope["path"] == "/files" and operation is not None
        if "signature" not in query or not is_for_file:
            return None
        return FileSignature(
            target_of(connection).sandbox_id,
            query.get("path", ""),
            operation or "",
            query.get("username", ""),
            query.get("signature_expiration"),
            query["signature"],
        )

    return read


def add_verifiers(
    credentials: Credentials, tokens: SandboxTokens, uploads: Uploads, clock: Clock
) -> None:
    """Add these kinds to the table of credentials."""

    async def by_token(one: AccessToken) -> Admission:
        return await tokens.enter(one.sandbox_id, one.secret)

    async def by_signature(one: FileSignature) -> Admission:
        token = tokens.access(one.sandbox_id)
        signed = f"{one.path}:{one.operation}:{one.user}:{token}"
        if one.expires is not None:
            signed += f":{one.expires}"
        digest = base64.b64encode(sha256(signed.encode()).digest()).rstrip(b"=").decode()
        if not hmac.compare_digest(one.signature.encode(), f"v1_{digest}".encode()):
            raise InvalidTokenError("invalid signature")
        if one.expires is not None:
            is_over = (
                not _EXPIRY.fullmatch(one.expires) or int(one.expires) < clock.now().timestamp()
            )
            if is_over:  # clients know this sentence
                raise TokenExpiredError("signature is already expired")
        return await tokens.enter(one.sandbox_id, token)

    async def by_permit(one: UploadSignature) -> Admission:
        return Admission(await uploads.enter(one.permit, one.signature))

    credentials.add(UploadSignature, by_permit)
    credentials.add(AccessToken, by_token)
    credentials.add(FileSignature, by_signature)
