"""Sandyard: real virtual machines for agents and people.

`from sandyard import Sandbox` is all that most programs need. Every name of `sandyard.client` can
be imported from here. They are looked up on first use: importing the package alone costs nothing,
and the server does not need the client's dependencies.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sandyard.client import *  # noqa: F403
else:  # a type checker would take any name for one that exists

    def __getattr__(name: str) -> Any:
        # Tools look for many special names in every module.
        if not name.startswith("_") or name == "__all__":
            client = importlib.import_module("sandyard.client")
            if name == "__all__" or name in client.__all__:
                return getattr(client, name)
        raise AttributeError(f"module 'sandyard' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return [*__getattr__("__all__"), *(one for one in globals() if one.startswith("__"))]
