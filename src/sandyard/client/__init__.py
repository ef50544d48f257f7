"""The Python SDK: sandboxes from Python, over httpx alone.

The client for asyncio is imported when one of its names is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sandyard.client._sync.client import Sandbox, Sandyard
from sandyard.client._sync.code import Context, Contexts
from sandyard.client._sync.desktop import Desktop
from sandyard.client._sync.local import Files, Watch, WorkspaceFiles
from sandyard.client._sync.network import Network
from sandyard.client._sync.processes import Process, Processes
from sandyard.client._sync.terminals import Terminal
from sandyard.client.config import ConfigError
from sandyard.client.errors import (
    AbsentError,
    ApiError,
    BadRequestError,
    ChangedError,
    CommandFailedError,
    ConflictError,
    ConnectionFailedError,
    DeniedError,
    ExistsError,
    ForbiddenError,
    InsufficientCreditsError,
    IsFolderError,
    NoProcessError,
    NoSpaceError,
    NotFolderError,
    NotFoundError,
    NotImplementedYetError,
    NotReadyError,
    RateLimitedError,
    SandyardError,
    StillStartingError,
    TimedOutError,
    TransferError,
    UnauthorizedError,
    UnavailableError,
)
from sandyard.client.models import (
    BuildLine,
    CodeError,
    CodeResult,
    Cost,
    ExecResult,
    Exited,
    FileChange,
    FileInfo,
    Lost,
    OutsideLink,
    PreviewUrl,
    Printed,
    ProcessInfo,
    RegistryCredential,
    Resources,
    Result,
    Secret,
    SignedUrl,
    Snapshot,
    SshAccess,
    TemplateBuild,
    TemplateInfo,
    TemplateVersion,
    WindowInfo,
    Workspace,
    WorkspaceEntry,
)
from sandyard.client.templates import BuildFailedError, Template

__all__ = [
    "AbsentError",
    "ApiError",
    "AsyncContext",
    "AsyncContexts",
    "AsyncDesktop",
    "AsyncFiles",
    "AsyncNetwork",
    "AsyncProcess",
    "AsyncProcesses",
    "AsyncSandbox",
    "AsyncSandyard",
    "AsyncTerminal",
    "AsyncWatch",
    "AsyncWorkspaceFiles",
    "BadRequestError",
    "BuildFailedError",
    "BuildLine",
    "ChangedError",
    "CodeError",
    "CodeResult",
    "CommandFailedError",
    "ConfigError",
    "ConflictError",
    "ConnectionFailedError",
    "Context",
    "Contexts",
    "Cost",
    "DeniedError",
    "Desktop",
    "ExecResult",
    "ExistsError",
    "Exited",
    "FileChange",
    "FileInfo",
    "Files",
    "ForbiddenError",
    "InsufficientCreditsError",
    "IsFolderError",
    "Lost",
    "Network",
    "NoProcessError",
    "NoSpaceError",
    "NotFolderError",
    "NotFoundError",
    "NotImplementedYetError",
    "NotReadyError",
    "OutsideLink",
    "PreviewUrl",
    "Printed",
    "Process",
    "ProcessInfo",
    "Processes",
    "RateLimitedError",
    "RegistryCredential",
    "Resources",
    "Result",
    "Sandbox",
    "Sandyard",
    "SandyardError",
    "Secret",
    "SignedUrl",
    "Snapshot",
    "SshAccess",
    "StillStartingError",
    "Template",
    "TemplateBuild",
    "TemplateInfo",
    "TemplateVersion",
    "Terminal",
    "TimedOutError",
    "TransferError",
    "UnauthorizedError",
    "UnavailableError",
    "Watch",
    "WindowInfo",
    "Workspace",
    "WorkspaceEntry",
    "WorkspaceFiles",
]

_ASYNC = {
    "AsyncSandbox": "_async.client",
    "AsyncSandyard": "_async.client",
    "AsyncContext": "_async.code",
    "AsyncContexts": "_async.code",
    "AsyncDesktop": "_async.desktop",
    "AsyncFiles": "_async.local",
    "AsyncWatch": "_async.local",
    "AsyncWorkspaceFiles": "_async.local",
    "AsyncNetwork": "_async.network",
    "AsyncProcess": "_async.processes",
    "AsyncProcesses": "_async.processes",
    "AsyncTerminal": "_async.terminals",
}

if TYPE_CHECKING:
    from sandyard.client._async.client import AsyncSandbox, AsyncSandyard
    from sandyard.client._async.code import AsyncContext, AsyncContexts
    from sandyard.client._async.desktop import AsyncDesktop
    from sandyard.client._async.local import AsyncFiles, AsyncWatch, AsyncWorkspaceFiles
    from sandyard.client._async.network import AsyncNetwork
    from sandyard.client._async.processes import AsyncProcess, AsyncProcesses
    from sandyard.client._async.terminals import AsyncTerminal
else:  # a type checker would take any name for one that exists

    def __getattr__(name: str) -> Any:
        if name not in _ASYNC:
            raise AttributeError(f"module 'sandyard.client' has no attribute {name!r}")
        found = getattr(importlib.import_module(f"sandyard.client.{_ASYNC[name]}"), name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*__all__, *globals()})
