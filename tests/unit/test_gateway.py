"""Host names of previews, and what becomes of headers on the way."""

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sandyard.server.core.errors import (
    ConflictError,
    InvalidTokenError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from sandyard.server.front import headers as h
from sandyard.server.front.hosts import is_below, name_of
from sandyard.server.gateway import refusals
from sandyard.server.gateway.error_page import rendered

DOMAIN = "preview.localhost:8080"
BOX = "sandbox-abcdef123456"
TOKEN = "abcdefghijklmnopqrstuvwx23"


def test_the_name_of_a_preview_says_what_it_is_of() -> None:
    found = name_of(f"3000-{BOX}.{DOMAIN}", DOMAIN)
    assert found is not None
    assert (found.port, found.sandbox_id, found.token) == (3000, BOX, None)
    found = name_of(f"65535-{BOX}-{TOKEN}.{DOMAIN}".upper(), DOMAIN)
    assert found is not None
    assert (found.port, found.token, found.host) == (65535, TOKEN, f"65535-{BOX}.{DOMAIN}")
    for port in ("", ":80", ":443"):
        assert name_of(f"1-{BOX}.p.example.org{port}", "p.example.org") is not None


@pytest.mark.parametrize(
    "host",
    [
        f"02280-{BOX}.{DOMAIN}", f"+80-{BOX}.{DOMAIN}", f" 80-{BOX}.{DOMAIN}",
        f"\uff18\uff10-{BOX}.{DOMAIN}", f"0x50-{BOX}.{DOMAIN}", f"80.0-{BOX}.{DOMAIN}",
        f"8_0-{BOX}.{DOMAIN}",
        f"0-{BOX}.{DOMAIN}", f"65536-{BOX}.{DOMAIN}", f"9111-{BOX}.{DOMAIN}", f"-{BOX}.{DOMAIN}",
        f"80-{BOX}x.{DOMAIN}", f"80-{BOX}-.{DOMAIN}", f"80-{BOX}-{TOKEN}x.{DOMAIN}",
        f"80-{BOX}-{TOKEN[:-1]}1.{DOMAIN}", f"a.80-{BOX}.{DOMAIN}", f"u:p@80-{BOX}.{DOMAIN}",
        f"80-{BOX}.preview.localhost..", f"80-{BOX}.preview.localhost:", f"80-{BOX}.{DOMAIN}0000",
        f"80-{BOX}.preview.localhost:080", f"80-{BOX}.{DOMAIN}.", DOMAIN, f".{DOMAIN}",
        f"80-{BOX}\n.{DOMAIN}", f"80-{BOX}.{DOMAIN}\n", "preview.localhost",
    ],
)  # fmt: skip
def test_what_is_no_name_of_a_preview_is_none_and_not_the_platforms_either(host: str) -> None:
    assert name_of(host, DOMAIN) is None
    assert is_below(host.strip(), DOMAIN)


@pytest.mark.parametrize(
    ("domain", "tail", "expected"),
    [
        (DOMAIN, DOMAIN, DOMAIN),
        # Through a port that ssh forwards, or a proxy.
        (DOMAIN, "preview.localhost:9090", "preview.localhost:9090"),
        (DOMAIN, "preview.localhost", "preview.localhost"),
        (DOMAIN, "preview.localhost:80", "preview.localhost:80"),
        # Fully qualified.
        (DOMAIN, "preview.localhost.:8080", DOMAIN),
        (DOMAIN, "preview.localhost.", "preview.localhost"),
        ("p.example.org", "p.example.org", "p.example.org"),
        ("p.example.org", "p.example.org:443", "p.example.org"),
        ("p.example.org", "P.Example.org.:8443", "p.example.org:8443"),
    ],
)
def test_the_port_is_the_clients_and_a_name_may_end_in_a_dot(
    domain: str, tail: str, expected: str
) -> None:
    found = name_of(f"3000-{BOX}-{TOKEN}.{tail}", domain)
    assert found is not None
    assert found.host == f"3000-{BOX}.{expected}"
    assert found.full_host == f"3000-{BOX}-{TOKEN}.{expected}"


@pytest.mark.parametrize(
    "host", ["localhost:8080", "sandyard.example.org", "xpreview.localhost:8080", "", "[::1]:8080"]
)
def test_the_platforms_own_names_are_no_previews(host: str) -> None:
    assert not is_below(host, DOMAIN)
    assert name_of(host, DOMAIN) is None


NEARLY = st.tuples(
    st.sampled_from(["80", "65535", "080", "+80", "8 0", "-80", "65536", "0", "", "\uff18\uff10"]),
    st.sampled_from(["-", "-", "--", "_"]),
    st.sampled_from([BOX, BOX.upper(), BOX[:-1], f"{BOX}x", BOX.replace("-", ""), "sandbox-"]),
    st.sampled_from(
        ["", "", "-", f"-{TOKEN}", f"-{TOKEN.upper()}", f"-{TOKEN[:-1]}", f"-{TOKEN}x"]
    ),
).map("".join)


@given(NEARLY | st.text(string.printable + "\uff10\uff18", max_size=80))
@example(f"80-{BOX}")
@example(f"65535-{BOX.upper()}-{TOKEN.upper()}")
def test_no_label_is_taken_for_another(label: str) -> None:
    found = name_of(f"{label}.{DOMAIN}", DOMAIN)
    if found is not None:
        token = "" if found.token is None else f"-{found.token}"
        assert label.lower() == f"{found.port}-{found.sandbox_id}{token}"


def sent(*headers: tuple[bytes, bytes], strips: bool = False) -> list[tuple[bytes, bytes]]:
    host = f"3000-{BOX}.{DOMAIN}"
    return h.to_guest(
        headers, port=3000, hosts=[host, f"3000-{BOX}-{TOKEN}.{DOMAIN}"], client="192.0.2.1",
        scheme="https", query_token="rt_token", strips_authorization=strips,
    )  # fmt: skip


def test_a_guest_hears_that_it_is_spoken_to_as_localhost() -> None:
    own = f"https://3000-{BOX}-{TOKEN}.{DOMAIN}"
    found = sent(
        (b"host", b"x"), (b"origin", own.encode()), (b"referer", f"{own}/a?b=c".encode()),
        (b"x-forwarded-for", b"1.1.1.1"), (b"x-forwarded-host", b"evil"), (b"accept", b"*/*"),
    )  # fmt: skip
    assert found == [
        (b"host", b"localhost:3000"), (b"origin", b"http://localhost:3000"),
        (b"referer", b"http://localhost:3000/a?b=c"), (b"accept", b"*/*"),
        (b"x-forwarded-for", b"192.0.2.1"), (b"x-forwarded-proto", b"https"),
    ]  # fmt: skip
    # Others are told as they are: whether they may is the guest's to say.
    assert (b"origin", b"https://evil.example") in sent((b"origin", b"https://evil.example"))
    assert (b"referer", b"https://a.example/x") in sent((b"referer", b"https://a.example/x"))


def test_what_lets_the_client_in_stays_with_us() -> None:
    cookies = b"a=1; sandyard_preview=secret; b=2;__Host-sandyard_preview=secret"
    assert (b"cookie", b"a=1; b=2") in sent((b"cookie", cookies))
    assert not [one for one in sent((b"cookie", b"sandyard_preview=x")) if one[0] == b"cookie"]
    for own in (b"Bearer rt_live_abc", b"bearer RT_TEST_abc"):
        assert not [one for one in sent((b"authorization", own)) if one[0] == b"authorization"]
    assert not [one for one in sent((b"x-api-key", b"rt_live_x")) if one[0] == b"x-api-key"]
    theirs = (b"authorization", b"token jupyter")
    assert theirs in sent(theirs)
    assert theirs not in sent(theirs, strips=True)


def test_headers_of_one_connection_do_not_travel() -> None:
    found = sent(
        (b"connection", b"close, X-Hop"), (b"x-hop", b"1"), (b"te", b"trailers"),
        (b"upgrade", b"h2c"),
        (b"keep-alive", b"1"), (b"transfer-encoding", b"chunked"),
    )  # fmt: skip
    assert {name for name, _ in found} == {b"host", b"x-forwarded-for", b"x-forwarded-proto"}


def answered(*headers: tuple[bytes, bytes], policy: bool = True) -> list[tuple[bytes, bytes]]:
    return h.to_client(
        headers, origin=f"https://3000-{BOX}.{DOMAIN}", port=3000, adds_policy=policy
    )


def test_a_guest_does_not_speak_for_the_platform() -> None:
    found = answered(
        (b"x-request-id", b"req_guest"), (b"x-ratelimit-limit", b"1"), (b"x-ratelimit-reset", b"2"),
        (b"x-rate", b"3"), policy=False,
    )  # fmt: skip
    assert found == [(b"x-rate", b"3")]


def test_a_guest_sets_cookies_for_itself_alone_and_never_ours() -> None:
    found = answered(
        (b"set-cookie", b"a=1; Domain=preview.localhost; Path=/; HttpOnly"),
        (b"set-cookie", b"b=2; domain = .localhost;Secure"), (b"set-cookie", b"c=3;DOMAIN"),
        (b"set-cookie", b"sandyard_preview=x"), (b"set-cookie", b"__Host-sandyard_preview=x"),
        (b"set-cookie", b" Sandyard_Preview =x"), (b"set-cookie", b"=sandyard_preview=x"),
        (b"set-cookie", b" =a=1"), (b"set-cookie", b"=; Path=/"), policy=False,
    )  # fmt: skip
    assert found == [
        (b"set-cookie", b"a=1; Path=/; HttpOnly"), (b"set-cookie", b"b=2;Secure"),
        (b"set-cookie", b"c=3"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("http://localhost:3000/a?b#c", f"https://3000-{BOX}.{DOMAIN}/a?b#c"),
        ("http://127.0.0.1:3000", f"https://3000-{BOX}.{DOMAIN}/"),
        ("http://localhost:3001/", "http://localhost:3001/"),
        ("https://example.org/", "https://example.org/"), ("/login", "/login"),
        ("http://[x", "http://[x"),
        ("http://localhost:99999999/", "http://localhost:99999999/"),
    ],
)  # fmt: skip
def test_where_a_guest_sends_to_itself_is_the_preview(said: str, told: str) -> None:
    assert answered((b"location", said.encode()), policy=False) == [(b"location", told.encode())]


def test_a_name_with_a_token_is_not_told_to_pages_elsewhere() -> None:
    assert answered() == [(b"referrer-policy", b"same-origin")]
    own = (b"referrer-policy", b"no-referrer")
    assert answered(own) == [own]


@pytest.mark.parametrize(
    "refused",
    [
        refusals.closed(3000),
        *(
            refusals.RefusalError(*one)
            for one in (refusals.NO_SUCH_NAME, refusals.SILENT, refusals.HUNG_UP, refusals.NO_HTTP)
        ),
        *(
            refusals.refusal_of(error)
            for error in (
                UnauthenticatedError("x"), InvalidTokenError("x"), NotFoundError("x"),
                ConflictError("cannot <b>run</b> & so on"), UnavailableError("x"),
            )
        ),
    ],
)  # fmt: skip
def test_a_page_tells_visitors_and_owners_what_they_can_do(refused: refusals.RefusalError) -> None:
    message = refused.message
    for part in (message.title, message.text, message.visitor, message.owner):
        assert len(part) > 5
    for wants_page in (True, False):
        _, body = rendered(
            refused.status, refused.code, message, request_id="r", wants_page=wants_page
        )
        assert b"<b>" not in body or not wants_page
        assert (b"Sandyard" in body) is wants_page
        assert (b"If somebody sent you this link" in body) is wants_page
