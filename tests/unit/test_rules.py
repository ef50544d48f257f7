"""Scopes, SSH keys, errors: small rules of core."""

import base64
import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandyard.server.core import errors
from sandyard.server.core.errors import Code, InvalidArgumentError, SandyardError
from sandyard.server.core.scopes import SCOPES, is_covered
from sandyard.server.core.sshkeys import is_literal_key
from sandyard.server.links.public_keys import checked_public_key


def blob(*parts: bytes) -> str:
    return base64.b64encode(b"".join(len(p).to_bytes(4, "big") + p for p in parts)).decode()


def rsa(size: int) -> str:
    modulus = bytes((0,)) + bytes((255,)) * size
    return "ssh-rsa " + blob(b"ssh-rsa", bytes((1, 0, 1)), modulus)


ED25519 = f"ssh-ed25519 {blob(b'ssh-ed25519', bytes(32))} me@here"
RSA_1024, RSA_2048 = rsa(128), rsa(256)


@pytest.mark.parametrize(
    ("held", "scope", "covers"),
    [
        ("*", "sandbox:read", True),
        ("sandbox:*", "sandbox:read", True),
        ("sandbox:read", "sandbox:read", True),
        ("sandbox:read", "sandbox:write", False),
        ("files:*", "sandbox:read", False),
        ("sandbox:read", "*", False),
        ("sandbox:create", "sandbox:*", False),
    ],
)
def test_scopes_cover_their_family(held: str, scope: str, covers: bool) -> None:
    assert is_covered(scope, [held]) is covers


@given(st.sampled_from(sorted(SCOPES)))
def test_nothing_covers_with_nothing_held(scope: str) -> None:
    assert not is_covered(scope, [])
    assert is_covered(scope, ["*"])


def line(kind: str, *fields: bytes) -> str:
    """Return a public key of these fields."""
    blob = b"".join(len(one).to_bytes(4, "big") + one for one in (kind.encode(), *fields))
    return f"{kind} {base64.b64encode(blob).decode()}"


TOKEN = line("sk-ssh-ed25519@openssh.com", bytes(range(32)), b"ssh:")


@pytest.mark.parametrize("key", [ED25519, RSA_2048, TOKEN])
def test_good_keys_are_kept_as_one_line(key: str) -> None:
    assert checked_public_key(f" {key}\n", field="k") == key
    assert is_literal_key(key)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "ssh-ed25519",
        "ssh-dss AAAA",
        RSA_1024,
        ED25519.replace("ssh-ed25519 ", "ssh-rsa ", 1),
        ED25519[:30],
        f"{ED25519}\n{ED25519}",
        "ssh-ed25519 ????",
        f"{ED25519.split()[0]} {ED25519.split()[1]}====",
        line("sk-ssh-ed25519@openssh.com", bytes(32)),  # without the application
        line("ssh-ed25519", bytes(32), b"more"),
        line("ssh-rsa", b"\x01\x00\x01", b"\x00" + b"\xff" * 255 + b"\xfe"),  # even
        line("ssh-rsa", b"\x02", b"\x00" + b"\xff" * 256),
        line("ecdsa-sha2-nistp256", b"nistp256", b"\x04" + bytes(64)),  # not on the curve
        "x" * 20_000,
    ],
)
def test_bad_keys_are_refused(key: str) -> None:
    with pytest.raises(InvalidArgumentError):
        checked_public_key(key, field="k")


def classes() -> list[type[SandyardError]]:
    return [
        found
        for _, found in inspect.getmembers(errors, inspect.isclass)
        if issubclass(found, SandyardError) and found is not SandyardError
    ]


def test_every_code_has_one_class_and_the_tree_names_them_all() -> None:
    own = [found for found in classes() if "code" in vars(found)]
    assert sorted(found.code for found in own) == sorted(Code)
    for found in classes():
        assert found.__name__ in (errors.__doc__ or "")


def test_only_what_may_be_tried_again_says_so() -> None:
    retryable = {found.code for found in classes() if found.retryable}
    assert retryable == {
        Code.RATE_LIMITED,
        Code.UNAVAILABLE,
        Code.NO_CAPACITY,
        Code.DEADLINE_EXCEEDED,
    }
