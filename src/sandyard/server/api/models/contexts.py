"""Contexts as HTTP carries them."""

from datetime import UTC, datetime
from typing import Literal

from pydantic import Field

from sandyard.server.api.models.base import Body, Content, Cwd, Model, Time, UserName, bounds
from sandyard.server.service.sandboxes.contexts import TIMEOUT_MS, Context, Piece
from sandyard.server.service.sandboxes.reports import CodeError, Result

_MOMENT_MAX_MS = 253_402_300_799_000  # the last second of the year 9999


class NewContext(Body):
    """A new context."""

    language: Literal["python", "node", "bash"] = "python"
    cwd: Cwd = "/workspace"
    user: UserName = "root"


class RunCode(Body):
    """A piece of code."""

    code: Content = Field(examples=["x = 6 * 7\nx"], description="Up to 1 MiB.")
    stdin: Content = Field("", description="What the code reads from its standard input.")
    timeout: int = Field(
        60_000,
        json_schema_extra=bounds(TIMEOUT_MS.start, TIMEOUT_MS.stop - 1),
        description="Milliseconds after which it is interrupted.",
    )

    def piece(self) -> Piece:
        """Return it as the service takes it."""
        return Piece(self.code, self.stdin, self.timeout)


class ContextOut(Model):
    """A context. `createdAt` is when its interpreter was last started."""

    id: str
    language: str
    cwd: str
    user: str
    created_at: Time


class InterruptedOut(Model):
    """The context whose code was interrupted, if it ran any."""

    id: str
    interrupted: bool


def context_out(context: Context) -> ContextOut:
    """Return a context as it is shown."""
    moment = max(0, min(_MOMENT_MAX_MS, context.created_ms)) / 1000
    return ContextOut(
        id=context.id,
        language=context.language,
        cwd=context.cwd,
        user=context.user,
        created_at=datetime.fromtimestamp(moment, UTC),
    )


def result_out(result: Result) -> dict[str, object]:
    """Return a result for an event."""
    return {**result.forms, "isMain": result.is_main, "truncated": result.is_truncated}


def code_error_out(error: CodeError) -> dict[str, object]:
    """Return an error of the code for an event."""
    return {"name": error.name, "value": error.value, "traceback": error.traceback}
