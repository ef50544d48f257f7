"""Calls of a sandbox's screen: screenshots, pointer and keyboard."""

from typing import Any

from sandyard.client.calls import Call
from sandyard.client.models import WindowInfo

_PICTURE_S = 60.0


def picture(path: str) -> Call[bool]:
    """Take a screenshot."""
    return Call("GET", f"{path}/screenshot", bool, limit_s=_PICTURE_S, safe=True)


def act(path: str, action: str, body: dict[str, Any]) -> Call[bool]:
    """Use the pointer or the keyboard."""
    # Not safe: typing or clicking twice would be wrong.
    return Call("POST", f"{path}/{action}", lambda answer: bool(answer["data"]), body=body)


def way(source: tuple[int, int], target: tuple[int, int], button: str) -> dict[str, Any]:
    """Return the arguments of a drag."""
    (from_x, from_y), (to_x, to_y) = source, target
    return {"fromX": from_x, "fromY": from_y, "toX": to_x, "toY": to_y, "button": button}


def windows(path: str) -> Call[list[WindowInfo]]:
    """List the windows."""
    return Call("GET", f"{path}/windows", _read_windows, safe=True)


def _read_windows(answer: Any) -> list[WindowInfo]:
    return [
        WindowInfo(
            id=one["id"],
            title=one["title"],
            program=one["program"],
            pid=one["pid"],
            x=one["x"],
            y=one["y"],
            width=one["width"],
            height=one["height"],
            is_active=one["isActive"],
        )
        for one in answer["data"]
    ]
