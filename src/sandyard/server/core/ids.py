"""Identifiers and names: how they look, how they are made, what is refused."""

import math
import re
import secrets
import string
import uuid
from collections.abc import Sequence
from hashlib import sha256
from typing import Final

from sandyard.server.core.errors import InvalidArgumentError

_ALPHABET = string.ascii_lowercase + string.digits
_KEY_ALPHABET = string.ascii_letters + string.digits
_SANDBOX_ID = re.compile(r"sandbox-[a-z0-9]{12}")
_MACHINE_ID = re.compile(r"machine-[a-z0-9]{12}")
SLUG = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"

NAME_MAX = 63
TAGS_MAX = 32
TAG_MAX = 64
_JSON_DEPTH = 64
API_KEY_PREFIX_LENGTH = 12


def new_sandbox_id() -> str:
    """Return a fresh sandbox id: `sandbox-` and 12 lower-case letters or digits."""
    return "sandbox-" + _random(_ALPHABET, 12)


def is_sandbox_id(text: str) -> bool:
    """Tell whether `text` has the form of a sandbox id."""
    return _SANDBOX_ID.fullmatch(text) is not None


def new_machine_id() -> str:
    """Return a fresh id of a machine on a node: `machine-` and 12 lower-case letters or digits."""
    return "machine-" + _random(_ALPHABET, 12)


def is_machine_id(text: str) -> bool:
    """Tell whether `text` has the form of a machine's id."""
    return _MACHINE_ID.fullmatch(text) is not None


def new_uuid() -> str:
    """Return a fresh random UUID in its usual text form."""
    return str(uuid.uuid4())


def is_uuid(text: str) -> bool:
    """Tell whether `text` is a UUID in its usual text form."""
    try:
        return str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False


def _random(alphabet: str, count: int) -> str:
    """Return random characters, each as likely; of one number, since each asks the kernel."""
    number, found = secrets.randbelow(len(alphabet) ** count), []
    for _ in range(count):
        number, digit = divmod(number, len(alphabet))
        found.append(alphabet[digit])
    return "".join(found)


def new_request_id() -> str:
    """Return a fresh request id: `req_` and 20 letters or digits."""
    return "req_" + _random(_ALPHABET, 20)


E2B_KEY: Final = "e2b_"
"""How API keys begin that clients of the E2B API accept."""


def new_api_key(*, is_test: bool = False, is_for_e2b: bool = False) -> str:
    """Return a fresh API key; it is shown once and only its digest is kept.

    Clients of the E2B API insist on `e2b_` and hex digits; 160 bits of them.
    """
    if is_for_e2b:
        return E2B_KEY + secrets.token_hex(20)
    kind = "test" if is_test else "live"
    return f"rt_{kind}_" + _random(_KEY_ALPHABET, 32)


def new_secret() -> str:
    """Return 256 fresh random bits as text that is safe in files and JSON."""
    return secrets.token_hex(32)


def digest_of_key(key: str) -> str:
    """Return the digest under which an API key is stored and looked up.

    A plain SHA-256 suffices: the key itself carries over 190 random bits, so there is nothing to
    guess.
    """
    return sha256(key.encode()).hexdigest()


def generation_of(digest: str) -> str:
    """Return a name for the secret with this digest: 16 hex digits that tell nothing about either.

    A key keeps its id when it is rotated, and gets another generation.
    """
    return sha256(b"sandyard: generation, 1 " + digest.encode()).hexdigest()[:16]


def is_slug(text: str) -> bool:
    """Tell whether `text` can be a template's slug."""
    return re.fullmatch(SLUG, text) is not None


PERSONAL = "personal-"
"""How the slugs of members' own workspaces begin."""


def check_slug(slug: str) -> str:
    """Return a slug that a client chose.

    Raises:
        InvalidArgumentError: it is none.
    """
    if not is_slug(slug):
        raise InvalidArgumentError(
            "cannot use this slug: it is lower-case letters, digits and -", field="slug"
        )
    return slug


def slug_of(name: str, an_id: str) -> str:
    """Return a slug that nothing else has: the name reduced, and a part of the id."""
    reduced = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")
    return f"{reduced or 'x'}-{an_id[:8]}"


def checked_text(text: str, *, field: str) -> str:
    """Return `text`, refusing U+0000 and lone surrogates, which no store or guest can keep.

    Raises:
        InvalidArgumentError: such a character is in it; `facts` name the field.
    """
    if "\x00" in text:
        raise InvalidArgumentError(
            "cannot take {field}: it has the character U+0000; remove it", field=field
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            "cannot take {field}: it is not valid Unicode (a lone surrogate); remove it",
            field=field,
        ) from error
    return text


def check_json(value: object, *, field: str, depth: int = 0) -> None:
    """Refuse a JSON value that not every database and client can keep.

    Raises:
        InvalidArgumentError: text as `checked_text` refuses it, a number that is not finite, or
            nesting over 64 deep.
    """
    if depth > _JSON_DEPTH:
        raise InvalidArgumentError(
            f"cannot take {{field}}: it is nested over {_JSON_DEPTH} deep", field=field
        )
    if isinstance(value, str):
        checked_text(value, field=field)
    elif isinstance(value, float) and not math.isfinite(value):
        raise InvalidArgumentError("cannot take {field}: NaN is not JSON", field=field)
    elif isinstance(value, list):
        for one in value:
            check_json(one, field=field, depth=depth + 1)
    elif isinstance(value, dict):
        for name, one in value.items():
            checked_text(str(name), field=field)
            check_json(one, field=field, depth=depth + 1)


def checked_name(name: str) -> str:
    """Return a sandbox's name, refusing what looks like an id or cannot be printed.

    Raises:
        InvalidArgumentError: not 1 to 63 printable characters, or of an id's form.
    """
    checked_text(name, field="name")
    if not 1 <= len(name) <= NAME_MAX or not name.isprintable() or not name.strip():
        raise InvalidArgumentError(
            f"cannot use this name: it needs 1 to {NAME_MAX} printable characters", field="name"
        )
    check_addressable(name)
    if name.startswith("sandbox-") and is_sandbox_id(name):
        raise InvalidArgumentError(
            "cannot use this name: it has the form of a sandbox id; choose another", field="name"
        )
    return name


def check_addressable(name: str) -> None:
    """Refuse a name that would not survive as a part of an address's path.

    Raises:
        InvalidArgumentError: it has a slash, or is `.` or `..`.
    """
    if "/" in name or name in (".", ".."):
        raise InvalidArgumentError(
            "cannot use this name: it could not be asked for by it; leave out slashes, and use "
            "more than dots",
            field="name",
        )


def checked_tags(tags: Sequence[str]) -> tuple[str, ...]:
    """Return tags without repeats, in the order given.

    Raises:
        InvalidArgumentError: more than 32 tags, or one that is not 1 to 64 characters.
    """
    if len(tags) > TAGS_MAX:
        raise InvalidArgumentError(
            f"cannot take {len(tags)} tags: at most {TAGS_MAX} are allowed", field="tags"
        )
    for tag in tags:
        checked_text(tag, field="tags")
        if not 1 <= len(tag) <= TAG_MAX:
            raise InvalidArgumentError(
                f"cannot take a tag of {len(tag)} characters: 1 to {TAG_MAX} are allowed",
                field="tags",
            )
    return tuple(dict.fromkeys(tags))


def hostname_of(name: str | None, sandbox_id: str) -> str:
    """Return the hostname of a sandbox: its name reduced to `[a-z0-9-]`, else its id."""
    reduced = re.sub(r"[^a-z0-9]+", "-", (name or "").lower()).strip("-")[:NAME_MAX].strip("-")
    return reduced or sandbox_id
