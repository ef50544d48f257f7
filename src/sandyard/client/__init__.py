"""The Python SDK: sandboxes from Python, over httpx alone."""

from sandyard.client.client import ExecResult, Sandbox, Sandyard, Snapshot
from sandyard.client.errors import ApiError, ConnectionFailedError, TransferError
from sandyard.client.files import FileInfo, Files
from sandyard.client.processes import Exited, Lost, Printed, Process, Processes, ProcessInfo

__all__ = [
    "ApiError",
    "ConnectionFailedError",
    "ExecResult",
    "Exited",
    "FileInfo",
    "Files",
    "Lost",
    "Printed",
    "Process",
    "ProcessInfo",
    "Processes",
    "Sandbox",
    "Sandyard",
    "Snapshot",
    "TransferError",
]
