"""One compiling of the API's routes for all the applications that tests open."""

from collections.abc import Callable
from typing import Any

from fastapi import routing


def compile_once() -> None:
    """Have FastAPI keep what it makes of a route when an application answers its first request.

    It takes half a second for all of them, which a server takes once, and tests a thousand times.
    What is made depends on the route alone: services are found by the application of a request.
    """
    kind: Any = getattr(routing, "_IncludedRouter", None)
    made: Callable[..., Any] | None = getattr(kind, "_build_effective_context", None)
    if made is None:  # another FastAPI: slower, and as right
        return
    kept: dict[tuple[int, str], tuple[object, object]] = {}

    def once(router: Any, route: Any) -> object:
        key = (id(route), router.include_context.prefix)
        if key not in kept:
            kept[key] = (made(router, route), route)  # the route too: else its id may be another's
        return kept[key][0]

    kind._build_effective_context = once
