"""Desktops as HTTP carries them."""

from typing import Literal

from pydantic import Field

from sandyard.server.api.models.base import Body, Model, Time
from sandyard.server.service.sandboxes.desktops import TEXT_MAX, Point, Window
from sandyard.server.service.sandboxes.keysyms import KEYS

Button = Literal["left", "middle", "right"]


class VncOut(Model):
    """Where a desktop is to be seen: a page, once, within a minute; and the host that has it."""

    url: str
    expires_at: Time
    host: str
    port: int


class PlaceIn(Body):
    """A place on the screen, in pixels from its upper left corner."""

    x: int = Field(ge=0, le=65535)
    y: int = Field(ge=0, le=65535)

    def place(self) -> Point:
        """Return the place."""
        return Point(self.x, self.y)


class Click(PlaceIn):
    """A click."""

    button: Button = "left"
    count: int = Field(1, ge=1, le=5, description="2 is a double click.")


class Drag(Body):
    """A drag from one place to another."""

    from_x: int = Field(ge=0, le=65535)
    from_y: int = Field(ge=0, le=65535)
    to_x: int = Field(ge=0, le=65535)
    to_y: int = Field(ge=0, le=65535)
    button: Button = "left"


class Scroll(PlaceIn):
    """Turns of the wheel, by notches; below 0 they go left, or up."""

    dx: int = Field(0, ge=-100, le=100)
    dy: int = Field(0, ge=-100, le=100)


class TypeText(Body):
    """A text that is typed."""

    text: str = Field(
        max_length=TEXT_MAX,
        json_schema_extra={"pattern": r"^[^\x00-\x08\x0b\x0c\x0e-\x1f]*$"},
    )


class PressKeys(Body):
    """Keys that are pressed together."""

    keys: str = Field(max_length=200, examples=["ctrl+c"], json_schema_extra={"pattern": KEYS})


class DoneOut(Model):
    """The action was done."""

    done: Literal[True] = True


class WindowOut(Model):
    """A window on the screen."""

    id: str
    title: str
    program: str
    pid: int
    x: int
    y: int
    width: int
    height: int
    is_active: bool


def window_out(window: Window) -> WindowOut:
    """Return a window as it is shown."""
    return WindowOut.model_validate(vars(window), by_name=True)
