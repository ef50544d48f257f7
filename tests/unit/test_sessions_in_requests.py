"""Which requests to a sandbox's port carry a session of the platform."""

import pytest

from sandyard.server.core.errors import InvalidTokenError, UnavailableError
from sandyard.server.front.sessions import has_session


class Provider:
    """Knows one session; of another it cannot tell now."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def verify(self, credential: object) -> None:
        text = getattr(credential, "secret", "")
        self.asked.append(text)
        if "unknown" in text:
            raise UnavailableError("the provider does not answer")
        if "ours" not in text:
            raise InvalidTokenError("it is another maker's")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ((b"authorization", b"Bearer eyJours"), True),
        ((b"authorization", b"bearer  eyJours"), True),
        ((b"x-api-key", b"eyJours"), True),
        ((b"x-api-key", b"eyJunknown"), True),
        ((b"authorization", b"Bearer eyJother"), False),
        ((b"authorization", b"Basic eyJours"), False),
        ((b"authorization", b"Bearer something"), False),
        ((b"x-other", b"eyJours"), False),
    ],
)
async def test_a_session_is_recognized(header: tuple[bytes, bytes], *, expected: bool) -> None:
    assert await has_session([(b"host", b"h"), header], Provider()) == expected  # type: ignore[arg-type]


async def test_only_what_may_be_a_session_is_verified() -> None:
    provider = Provider()
    headers = [(b"authorization", b"Bearer rt_live_x"), (b"x-api-key", b"other")]
    assert not await has_session(headers, provider)  # type: ignore[arg-type]
    assert provider.asked == []
