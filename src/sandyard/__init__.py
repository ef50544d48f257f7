"""Sandyard: real virtual machines for agents and people.

`from sandyard import Sandbox` is all that most programs need. Names are looked up when they are
first used: to import the package costs nothing, and the server's parts need no client.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sandyard.client import ApiError as ApiError
    from sandyard.client import AsyncSandbox as AsyncSandbox
    from sandyard.client import AsyncSandyard as AsyncSandyard
    from sandyard.client import Sandbox as Sandbox
    from sandyard.client import Sandyard as Sandyard
    from sandyard.client import SandyardError as SandyardError

__all__ = [
    "ApiError",
    "AsyncSandbox",
    "AsyncSandyard",
    "Sandbox",
    "Sandyard",
    "SandyardError",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("sandyard.client"), name)
    raise AttributeError(f"module 'sandyard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
