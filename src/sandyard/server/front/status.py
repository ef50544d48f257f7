"""The HTTP status of each error, unless a face's clients expect another one."""

from collections.abc import Mapping
from types import MappingProxyType

from sandyard.server.core.errors import Code

STATUS: Mapping[Code, int] = MappingProxyType(
    {
        Code.BAD_REQUEST: 400,
        Code.UNAUTHORIZED: 401,
        Code.INVALID_TOKEN: 401,
        Code.TOKEN_EXPIRED: 401,
        Code.INSUFFICIENT_CREDITS: 402,
        Code.FORBIDDEN: 403,
        Code.NOT_FOUND: 404,
        Code.CONFLICT: 409,
        Code.WORKSPACE_IN_USE: 409,
        Code.LIMIT_REACHED: 409,
        Code.INVALID_STATE: 409,
        Code.IDEMPOTENCY_KEY_REUSED: 400,
        Code.PRECONDITION_FAILED: 412,
        Code.DAMAGED: 409,
        Code.INCOMPATIBLE: 409,
        Code.UNSUPPORTED: 400,
        Code.PAYLOAD_TOO_LARGE: 413,
        Code.RATE_LIMITED: 429,
        Code.INTERNAL_ERROR: 500,
        Code.NOT_IMPLEMENTED: 501,
        Code.AGENT_ERROR: 502,
        Code.UNAVAILABLE: 503,
        Code.NO_CAPACITY: 503,
        Code.DEADLINE_EXCEEDED: 503,
    }
)
