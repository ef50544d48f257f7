"""Network rules: what they may say, what they mean, and in which order."""

import subprocess
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandyard.server.core.egress import (
    NO_RULES,
    Egress,
    Injection,
    Pattern,
    Policy,
    Rules,
    checked,
    covers,
    filled,
    plain_name,
    secrets_in,
)
from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.node.host.firewall import UNREACHABLE, egress_rules

PRIVATE = tuple(map(IPv4Network, UNREACHABLE))


def rules(*allow: str, deny: tuple[str, ...] = (), egress: Egress = Egress.DENY) -> Rules:
    return Rules(checked(Policy(egress, allow, deny)), PRIVATE)


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("203.0.113.7", "203.0.113.7/32"), ("203.0.113.0/24", "203.0.113.0/24"),
        ("0.0.0.0/0", "0.0.0.0/0"), ("GitHub.COM.", "github.com"),
        ("*.Example.com", "*.example.com"),
        ("github.com:22", "github.com:22"), ("*.example.com:8443", "*.example.com:8443"),
        ("b\u00fccher.example", "xn--bcher-kva.example"),
        ("_sip._tcp.example.com", "_sip._tcp.example.com"),
        ("example.com:443", "example.com:443"),
    ],
)  # fmt: skip
def test_rules_have_a_plain_form(written: str, plain: str) -> None:
    assert checked(Policy(Egress.DENY, (written, written))).allow == (plain,)
    assert checked(Policy(Egress.DENY, (plain,))).allow == (plain,)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("*", "a rule is"), ("*.com", "goes before a name"), ("", "a rule is"), ("..", "a rule is"),
        ("a..b", "a rule is"), ("-a.com", "a rule is"), ("a.com:0", "a rule is"),
        ("a.com:65536", "a rule is"), ("a.com:https", "a rule is"), ("http://a.com", "a rule is"),
        ("a.com/path", "a rule is"), ("a b.com", "a rule is"), ("*.*.com", "a rule is"),
        ("*a.com", "a rule is"), ("1.2.3.0/33", "netmask"), ("1.2.3.4/24", "host bits"),
        ("1.2.3", "4 octets"), ("0x7f.1", "a rule is"), ("x" * 64 + ".com", "a rule is"),
        ("a." * 130 + "com", "a rule is"), ("stra\u00dfe.de", "a rule is"),
        ("a\u200d.com", "a rule is"),
        ("10.0.0.1:80", "a rule is"), ("a.com:22:22", "a rule is"), ("a.com\n", "a rule is"),
        ("::1", "no IPv6"),
    ],
)  # fmt: skip
def test_rules_that_could_mean_something_else_are_refused(rule: str, says: str) -> None:
    with pytest.raises(InvalidArgumentError, match=says) as caught:
        checked(Policy(Egress.DENY, (rule,)))
    assert caught.value.facts["field"] == "network.allow"


def test_names_cannot_be_denied_and_lists_have_a_limit() -> None:
    with pytest.raises(InvalidArgumentError, match="a name cannot be denied"):
        checked(Policy(deny=("example.com",)))
    with pytest.raises(InvalidArgumentError, match="no IPv6"):
        checked(Policy(deny=("2001:db8::/32",)))
    with pytest.raises(InvalidArgumentError, match="257 rules"):
        checked(Policy(allow=("a.com",) * 257))


@given(st.text(max_size=80))
def test_any_text_is_taken_or_refused(text: str) -> None:
    for allow, deny in (((text,), ()), ((), (text,))):
        try:
            made = checked(Policy(Egress.DENY, allow, deny))
        except InvalidArgumentError:
            continue
        assert checked(made) == made
        Rules(made, PRIVATE)


def test_a_star_means_what_is_below_a_name() -> None:
    wild, whole = Pattern("example.com", is_wild=True), Pattern("example.com")
    assert wild.matches("a.example.com")
    assert wild.matches("b.a.example.com")
    assert not wild.matches("example.com")
    assert not wild.matches("badexample.com")
    assert whole.matches("example.com")
    assert not whole.matches("a.example.com")


def test_allow_comes_before_deny_and_nothing_before_private_ranges() -> None:
    judged = rules("203.0.113.0/25", "10.0.0.0/8", deny=("203.0.113.0/24",), egress=Egress.ALLOW)
    says = {
        address: (found.may_pass, found.rule)
        for address in ("203.0.113.1", "203.0.113.200", "198.51.100.1", "10.1.1.1")
        for found in [judged.of_address(IPv4Address(address))]
    }
    assert says == {
        "203.0.113.1": (True, "203.0.113.0/25"),
        "203.0.113.200": (False, "203.0.113.0/24"),
        "198.51.100.1": (True, "egress"),
        "10.1.1.1": (False, "private"),
    }
    opened = Rules(judged.policy, PRIVATE, (IPv4Network("10.1.0.0/16"),))
    assert opened.of_address(IPv4Address("10.1.1.1")).may_pass
    assert not opened.of_address(IPv4Address("10.2.1.1")).may_pass


def test_a_name_opens_the_ports_of_the_web_or_the_one_it_has() -> None:
    judged = rules("github.com", "github.com:22", "plain.test:80")
    assert judged.of_name("github.com", 443) is not None
    assert list(judged.ports_of("github.com")) == [(22, "github.com:22")]
    assert judged.of_name("plain.test", 80) is not None
    assert judged.of_name("plain.test", 443) is None
    assert judged.named_ports == {80, 443}
    assert judged.may_resolve("github.com").may_pass
    assert not judged.may_resolve("gist.github.com").may_pass


def test_only_what_restricts_is_a_rule() -> None:
    assert NO_RULES.is_default
    assert NO_RULES.digest == ""
    assert Policy(allow=("a.com",)).is_default
    assert not Policy(deny=("203.0.113.0/24",)).is_default
    one, two = Policy(Egress.DENY, ("a",), ("b",)), Policy(Egress.DENY, ("a", "b"))
    assert one.digest != two.digest


@given(st.text(st.sampled_from("aA0-_.\u00fc*:"), max_size=12))
def test_plain_names_stay_as_they_are(text: str) -> None:
    name = plain_name(text)
    assert name is None or plain_name(name) == name


@pytest.mark.root
@pytest.mark.parametrize(
    "judged",
    [
        rules(), rules("0.0.0.0/0"), rules("203.0.113.0/24", "203.0.113.7"),
        rules("a.com", deny=("1.0.0.0/8", "1.2.0.0/16", "0.0.0.0/0"), egress=Egress.ALLOW),
        Rules(
            Policy(Egress.DENY), PRIVATE, (IPv4Network("10.1.0.0/16"), IPv4Network("10.1.2.0/24"))
        ),
    ],
)  # fmt: skip
def test_the_kernel_takes_the_rules(judged: Rules) -> None:
    text = egress_rules(tap="tap0", rules=judged)
    done = subprocess.run(
        ["nft", "--check", "-f", "-"], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def injected(headers: dict[str, str], host: str = "api.a.test", **rules: object) -> Policy:
    return checked(Policy(inject=(Injection(host, headers),), **rules))  # type: ignore[arg-type]


def test_headers_for_hosts_have_a_plain_form() -> None:
    made = injected({"Authorization": "Bearer ${token}", "X-Static": "a b"}, "*.API.a.test.")
    assert made.inject[0].host == "*.api.a.test"
    assert not made.is_default
    assert made.digest
    assert made.digest == made.bare.digest, "nodes do not have the texts"
    assert made.bare.inject[0].headers == {}
    assert "Bearer" not in repr(made)
    rules = Rules(made)
    assert rules.ends_tls_of("v1.api.a.test")
    assert not rules.ends_tls_of("api.a.test")
    assert rules.named_ports == {443}


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({}, "needs 1 to 16 headers"), ({f"X-{n}": "a" for n in range(17)}, "needs 1 to 16"),
        ({"Host": "a"}, "belongs to the connection"), ({"TE": "a"}, "belongs to the connection"),
        ({"content-LENGTH": "1"}, "belongs to"), ({"Proxy-Authorization": "a"}, "belongs to"),
        ({"a b": "c"}, "no name of a header"), ({"": "c"}, "no name of a header"),
        ({"A": "1", "a": "2"}, "there twice"), ({"A": ""}, "printable ASCII"),
        ({"A": "b\r\nC: d"}, "printable ASCII"), ({"A": "\u00e4"}, "printable ASCII"),
        ({"A": " b"}, "no spaces around"), ({"A": "${1X}"}, "a secret is written as"),
        ({"A": "${}"}, "a secret is written as"), ({"A": "${base64:a:b:C}"}, "a secret is written"),
        ({"A": "${e2b.identity.tokens.aws}"}, "a secret is written as"),
        ({"A": "x" * 5000}, "printable ASCII"),
    ],
)  # fmt: skip
def test_headers_that_cannot_be_sent_are_refused(headers: dict[str, str], says: str) -> None:
    with pytest.raises(InvalidArgumentError, match=says):
        injected(headers)


def test_headers_need_a_host_that_may_be_reached() -> None:
    for host in ("*", "a", "1.2.3.4", "a.test:443", "*.test", "https://a.test"):
        if host != "a":
            with pytest.raises(InvalidArgumentError, match="it takes names"):
                injected({"A": "b"}, host)
    with pytest.raises(InvalidArgumentError, match=r"do not allow api\.a\.test"):
        injected({"A": "b"}, egress=Egress.DENY, allow=("a.test", "api.a.test:8443"))
    for rule in ("api.a.test", "*.a.test"):
        assert injected({"A": "b"}, egress=Egress.DENY, allow=(rule,)).inject


@pytest.mark.parametrize(
    ("wide", "narrow", "does"),
    [
        ("a.test", "a.test", True), ("*.a.test", "b.a.test", True), ("*.a.test", "a.test", False),
        ("*.a.test", "*.b.a.test", True), ("*.a.test", "*.a.test", True),
        ("a.test", "*.a.test", False), ("b.a.test", "*.a.test", False),
        ("*.a.test", "ba.test", False),
    ],
)  # fmt: skip
def test_a_host_covers_what_is_meant_by_it(wide: str, narrow: str, *, does: bool) -> None:
    assert covers(wide, narrow) is does


def test_texts_are_filled_with_secrets() -> None:
    values = {"A": "1", "B_2": "x:y"}
    assert filled("Bearer ${A}-${b_2}$", values) == "Bearer 1-x:y$"
    assert filled("Basic ${base64:user name:B_2}", values) == "Basic dXNlciBuYW1lOng6eQ=="
    assert filled("${A} ${C}", values) is None
    assert filled("plain", {}) == "plain"
    assert filled("${A}", {"A": "${B}", "B": "no"}) == "${B}", "once"
    assert secrets_in("${A} ${base64:u:b} $C {D}") == ("A", "B")
