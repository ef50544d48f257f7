"""Commands as HTTP carries them."""

from typing import Literal

from pydantic import Field

from sandyard.server.api.models.base import Model
from sandyard.server.service.sandboxes.execute import Outcome


class Exec(Model):
    """The body of an exec."""

    command: str = Field(examples=["uname -a"])
    timeout: int = Field(30_000, description="Milliseconds from the start of the command.")
    cwd: str = "/workspace"
    env: dict[str, str] = {}
    stdin: str | None = None
    user: str = "root"
    encoding: Literal["utf-8", "base64"] = "utf-8"


class ExecOut(Model):
    """How a command ended."""

    stdout: str
    stderr: str
    exit_code: int
    duration_ms: int
    execution_time: int
    timed_out: bool
    truncated: bool
    signal: str | None


def exec_out(outcome: Outcome) -> ExecOut:
    """Return how a command ended as it is shown."""
    return ExecOut(**vars(outcome), execution_time=outcome.duration_ms)
