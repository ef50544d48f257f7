"""Names of keys, as X has them (keysymdef.h): what people and programs call them, and numbers."""

from sandyard.server.core.errors import InvalidArgumentError

_NAMED = {
    "backspace": 0xFF08, "tab": 0xFF09, "return": 0xFF0D, "enter": 0xFF0D, "pause": 0xFF13,
    "escape": 0xFF1B, "esc": 0xFF1B, "delete": 0xFFFF, "home": 0xFF50, "left": 0xFF51,
    "up": 0xFF52, "right": 0xFF53, "down": 0xFF54, "pageup": 0xFF55, "page_up": 0xFF55,
    "prior": 0xFF55, "pagedown": 0xFF56, "page_down": 0xFF56, "next": 0xFF56, "end": 0xFF57,
    "insert": 0xFF63, "menu": 0xFF67, "print": 0xFF61, "space": 0x20, "plus": 0x2B, "minus": 0x2D,
    "shift": 0xFFE1, "ctrl": 0xFFE3, "control": 0xFFE3, "capslock": 0xFFE5, "alt": 0xFFE9,
    "option": 0xFFE9, "altgr": 0xFE03, "meta": 0xFFEB, "super": 0xFFEB, "win": 0xFFEB,
    "cmd": 0xFFEB, "command": 0xFFEB,
    **{f"f{number}": 0xFFBD + number for number in range(1, 25)},
}  # fmt: skip
_KEYS_MAX = 8
_KEY = "|".join((r"[\p{L}\p{M}\p{N}\p{P}\p{S}]", *_NAMED, *(one.capitalize() for one in _NAMED)))
KEYS = rf"^(({_KEY})\+){{0,{_KEYS_MAX - 1}}}({_KEY})$"
"""The pattern of keys in their usual spellings."""


def keysym_of(character: str) -> int:
    """Return the number of the key that types a character."""
    if character in "\r\n":
        return _NAMED["return"]
    if character == "\t":
        return _NAMED["tab"]
    code = ord(character)
    return code if 0x20 <= code <= 0x7E or 0xA0 <= code <= 0xFF else 0x01000000 + code


def keysyms_of(keys: str) -> list[int]:
    """Return the numbers of keys that are pressed together: `Return`, `ctrl+c`, `ctrl+shift+t`.

    Raises:
        InvalidArgumentError: there is no such key.
    """
    ends_in_plus = keys == "+" or keys.endswith("++")
    before = keys[:-2] if ends_in_plus else keys
    parts = [*(before.split("+") if before else ()), *("+" * ends_in_plus)]
    if not 1 <= len(parts) <= _KEYS_MAX:
        raise InvalidArgumentError(
            "cannot press that: give keys such as Return, a or ctrl+shift+t", field="keys"
        )
    found = []
    for part in parts:
        known = _NAMED.get(part.lower())
        if known is None and (len(part) != 1 or not part.isprintable()):
            raise InvalidArgumentError(
                f"cannot press {part[:40]!r}: there is no such key; such are Return, Tab, Escape, "
                "F1, Left, ctrl, alt, shift, super, or one character",
                field="keys",
            )
        found.append(known if known is not None else keysym_of(part))
    return found
