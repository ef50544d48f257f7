"""The Python SDK: sandboxes from Python, over httpx alone."""

from sandyard.client.client import ExecResult, Sandbox, Sandyard, Snapshot
from sandyard.client.errors import ApiError, ConnectionFailedError

__all__ = ["ApiError", "ConnectionFailedError", "ExecResult", "Sandbox", "Sandyard", "Snapshot"]
