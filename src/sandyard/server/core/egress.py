"""What a sandbox may reach: the grammar of its rules, and their order.

The order: private ranges are never reached, except those that the operator allows; then `allow`,
then `deny`, then `egress`. A name is judged where a connection carries one, in its TLS server name
(RFC 6066, 3) or its Host header; a literal address is judged by ranges alone.
"""

import ipaddress
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from hashlib import sha256
from typing import Final

from sandyard.server.core.errors import InvalidArgumentError

TLS_PORT: Final = 443
NAME_PORTS: Final = frozenset({80, TLS_PORT})
"""The ports that a name without one opens."""
_RULES_MAX: Final = 256
FILLED_MAX: Final = 32 * 1024
"""Characters of a header with its secrets."""
_ENDED_MAX, _HEADERS_MAX, _HEADER_MAX = 64, 16, 4096
_TEXT_MAX: Final = 260
_NAME_MAX, _LABEL_MAX = 253, 63
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?")
# A secret in the text of a header.
_PLACE = re.compile(
    r"\$\{(?:base64:(?P<user>[^:{}]{1,256}):)?(?P<name>[A-Za-z_][A-Za-z0-9_]{0,63})\}"
)
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}")  # RFC 9110, 5.6.2
_OWN_HEADERS = frozenset(
    {
        "connection", "content-length", "expect", "host", "keep-alive", "te", "trailer",
        "transfer-encoding", "upgrade",
    }
)  # fmt: skip
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
# Letters that IDNA 2003, which Python has, and IDNA 2008, which browsers use, map to different
# names: to guess would open a name that was not meant.
_AMBIGUOUS = frozenset("ßς\u200c\u200d")
Network = ipaddress.IPv4Network
Address = ipaddress.IPv4Address


class Egress(StrEnum):
    """What happens to what no rule names."""

    ALLOW = "allow"
    DENY = "deny"


@dataclass(frozen=True)
class Injection:
    """Headers that are set in requests to a host, or with `*.` to all below one, by name: texts in
    which `${SECRET}` and `${base64:user:SECRET}` stand for secrets."""

    host: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Policy:
    """The rules of one sandbox. In their plain form (`checked`) ranges have a prefix length, and
    names are in lower case and ASCII. TLS is ended for the hosts of `inspect` and `inject`; `stamp`
    then changes with the rules, and while a machine may run with every secret in them."""

    egress: Egress = Egress.ALLOW
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    inspect: tuple[str, ...] = ()
    inject: tuple[Injection, ...] = ()
    stamp: str = ""

    @property
    def digest(self) -> str:
        """The digest of the rules, without the headers that are injected; nothing if there are
        none."""
        if self.is_default:
            return ""
        words = [self.egress.value, *self.allow, "", *self.deny]
        if self.ends_tls:
            words += ["", *self.inspect, "", *(one.host for one in self.inject)]
        return sha256("\n".join(words).encode()).hexdigest()[:16]

    @property
    def is_default(self) -> bool:
        """Whether it restricts nothing, and ends no TLS."""
        return self.egress is Egress.ALLOW and not self.deny and not self.ends_tls

    @property
    def ends_tls(self) -> bool:
        """Whether the TLS of some hosts is ended outside the machine."""
        return bool(self.inspect or self.inject)

    @property
    def bare(self) -> "Policy":
        """The policy as nodes have it: without the headers, which come as `Credentials`."""
        return replace(self, inject=tuple(Injection(one.host) for one in self.inject))


@dataclass(frozen=True)
class Header:
    """A header of requests to a host, or with `*.` to all below one; `value` is missing if one of
    its secrets is."""

    host: str
    name: str
    value: str | None = field(repr=False)
    secrets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Credentials:
    """What TLS is ended with: headers, and an authority's certificate and key (PEM). `stamp` is the
    policy's, and `name_hash` that of `core.ops.Trust`."""

    stamp: str
    headers: tuple[Header, ...] = field(repr=False)
    certificate: str = field(repr=False)
    key: str = field(repr=False)
    name_hash: str = ""


def digest_of(policy: Policy, stamp: str | None) -> str:
    """Return the digest of rules and of the credentials that are in force with them, if any."""
    return f"{policy.digest}+{stamp}" if stamp else policy.digest


NO_RULES: Final = Policy()
NOTHING: Final = Policy(egress=Egress.DENY)
"""Rules that let nothing pass."""


@dataclass(frozen=True)
class Pattern:
    """A name, or with `is_wild` all names below it; `ports` are those it opens."""

    name: str
    is_wild: bool = False
    ports: frozenset[int] = NAME_PORTS

    @property
    def text(self) -> str:
        """The rule as users write it."""
        name = f"*.{self.name}" if self.is_wild else self.name
        return name if self.ports == NAME_PORTS else f"{name}:{min(self.ports)}"

    def matches(self, name: str) -> bool:
        """Tell whether a plain name is meant."""
        return name.endswith(f".{self.name}") if self.is_wild else name == self.name


@dataclass(frozen=True)
class Judgement:
    """Whether something may pass, and the rule that decided: an entry of `allow` or `deny`,
    `egress`, or `private`."""

    may_pass: bool
    rule: str


@dataclass(frozen=True)
class Rules:
    """A policy, made ready to judge by; `unreachable` are the ranges that are private or the
    host's, and `permitted` those that the operator allows nevertheless."""

    policy: Policy
    unreachable: tuple[Network, ...] = ()
    permitted: tuple[Network, ...] = ()
    allowed: tuple[Network, ...] = field(init=False)
    denied: tuple[Network, ...] = field(init=False)
    patterns: tuple[Pattern, ...] = field(init=False)
    ended: tuple[Pattern, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Parse the rules once."""
        parsed = [_parsed(one) for one in self.policy.allow]
        # A frozen dataclass sets its derived fields like this.
        object.__setattr__(self, "allowed", _networks(parsed))
        object.__setattr__(self, "denied", _networks(map(_parsed, self.policy.deny)))
        patterns = tuple(one for one in parsed if isinstance(one, Pattern))
        object.__setattr__(self, "patterns", patterns)
        hosts = (*self.policy.inspect, *(one.host for one in self.policy.inject))
        object.__setattr__(self, "ended", tuple(map(pattern_of, hosts)))

    @property
    def denies(self) -> bool:
        """Whether what no rule names is refused."""
        return self.policy.egress is Egress.DENY

    @cached_property
    def named_ports(self) -> frozenset[int]:
        """The ports on which a connection is judged by its name."""
        ports = frozenset().union(*(one.ports for one in self.patterns)) & NAME_PORTS
        return ports | {TLS_PORT} if self.ended else ports

    def is_private(self, address: Address) -> bool:
        """Tell whether no rule of a user opens an address."""
        return _within(address, self.unreachable) and not _within(address, self.permitted)

    def of_name(self, name: str, port: int) -> Judgement | None:
        """Judge a plain name by `allow`; None if nothing there names it."""
        for one in self.patterns:
            if port in one.ports and one.matches(name):
                return Judgement(may_pass=True, rule=one.text)
        return None

    def ends_tls_of(self, name: str) -> bool:
        """Tell whether TLS with a host is ended here."""
        return any(one.matches(name) for one in self.ended)

    def injects_into(self, name: str) -> bool:
        """Tell whether requests to a host get headers."""
        return any(pattern_of(one.host).matches(name) for one in self.policy.inject)

    def ports_of(self, name: str) -> Iterable[tuple[int, str]]:
        """Yield the ports other than `NAME_PORTS` that are open to a name's addresses, and the rule
        of each."""
        for one in self.patterns:
            if one.matches(name):
                yield from ((port, one.text) for port in one.ports - NAME_PORTS)

    def may_resolve(self, name: str) -> Judgement:
        """Judge a question for a name's addresses."""
        found = next((one for one in self.patterns if one.matches(name)), None)
        if found is not None:
            return Judgement(may_pass=True, rule=found.text)
        return Judgement(may_pass=not self.denies, rule="egress")

    def of_address(self, address: Address) -> Judgement:
        """Judge an address by the ranges, and by `egress`."""
        if self.is_private(address):
            return Judgement(may_pass=False, rule="private")
        if (found := _found(address, self.allowed)) is not None:
            return Judgement(may_pass=True, rule=str(found))
        if (found := _found(address, self.denied)) is not None:
            return Judgement(may_pass=False, rule=str(found))
        return Judgement(may_pass=not self.denies, rule="egress")


def checked(policy: Policy) -> Policy:
    """Return a policy of a user in its plain form, without repetitions.

    Raises:
        InvalidArgumentError: a rule is invalid; `facts` name the field.
    """
    for field_name, rules in (("allow", policy.allow), ("deny", policy.deny)):
        if len(rules) > _RULES_MAX:
            raise InvalidArgumentError(
                f"cannot use {{field}}: it has {len(rules)} rules, and {_RULES_MAX} is the most",
                field=f"network.{field_name}",
            )
    if len(policy.inspect) + len(policy.inject) > _ENDED_MAX:
        raise InvalidArgumentError(
            f"cannot use {{field}}: `inspect` and `inject` name more than {_ENDED_MAX} hosts",
            field="network.inject",
        )
    allow = (_plain_rule(one, "network.allow") for one in policy.allow)
    deny = (_plain_range(one) for one in policy.deny)
    inspect = (plain_host(one, "network.inspect") for one in policy.inspect)
    made = replace(
        policy,
        allow=tuple(dict.fromkeys(allow)),
        deny=tuple(dict.fromkeys(deny)),
        inspect=tuple(dict.fromkeys(inspect)),
        inject=tuple(map(_plain_injection, policy.inject)),
    )
    _check_reachable(made)
    return made


def plain_host(text: str, where: str) -> str:
    """Return a name, or `*.` and a name, in plain form.

    Raises:
        InvalidArgumentError: it is neither.
    """
    name = plain_name(text.removeprefix("*.")) if len(text) <= _TEXT_MAX else None
    if name is None or (text.startswith("*.") and "." not in name):
        raise InvalidArgumentError(
            f"cannot use {text[:80]!r} in {{field}}: it takes names (api.example.com), and all "
            "names below one (*.example.com), without ports",
            field=where,
        )
    return f"*.{name}" if text.startswith("*.") else name


def pattern_of(host: str) -> Pattern:
    """Return the pattern of a host in plain form."""
    return Pattern(host.removeprefix("*."), is_wild=host.startswith("*."))


def covers(wide: str, narrow: str) -> bool:
    """Tell whether a host in plain form is meant by another one."""
    if wide == narrow:
        return True
    # `*.a.test` is below `*.test` as a name is.
    return wide.startswith("*.") and pattern_of(wide).matches(narrow.removeprefix("*."))


def secrets_in(text: str) -> tuple[str, ...]:
    """Return the names of the secrets in a header's text."""
    return tuple(found.group("name").upper() for found in _PLACE.finditer(text))


def filled(text: str, values: Mapping[str, str]) -> str | None:
    """Return a header's text with the values of its secrets; None if one is missing, or it becomes
    longer than `FILLED_MAX`."""

    def value(found: re.Match[str]) -> str:
        secret = values[found.group("name").upper()]
        user = found.group("user")
        return secret if user is None else b64encode(f"{user}:{secret}".encode()).decode()

    try:
        made = _PLACE.sub(value, text)
    except KeyError:
        return None
    return made if len(made) <= FILLED_MAX else None


def _plain_injection(injection: Injection) -> Injection:
    where = "network.inject"
    host = plain_host(injection.host, where)
    if not injection.headers or len(injection.headers) > _HEADERS_MAX:
        raise InvalidArgumentError(
            f"cannot use {{field}}: {host} needs 1 to {_HEADERS_MAX} headers", field=where
        )
    lowered = [name.lower() for name in injection.headers]
    for name, text in injection.headers.items():
        if not _TOKEN.fullmatch(name) or lowered.count(name.lower()) > 1:
            raise InvalidArgumentError(
                f"cannot use the header {name[:80]!r} in {{field}}: it is no name of a header, or "
                "there twice",
                field=where,
            )
        if name.lower() in _OWN_HEADERS or name.lower().startswith("proxy-"):
            raise InvalidArgumentError(
                f"cannot use the header {name} in {{field}}: it belongs to the connection itself",
                field=where,
            )
        is_text = text == text.strip() and text.isascii() and text.isprintable()
        if not text or len(text) > _HEADER_MAX or not is_text:
            raise InvalidArgumentError(
                f"cannot use the value of {name} in {{field}}: it needs 1 to {_HEADER_MAX} "
                "printable ASCII characters, and no spaces around them",
                field=where,
            )
        if "${" in _PLACE.sub("", text):
            raise InvalidArgumentError(
                f"cannot use the value of {name} in {{field}}: a secret is written as "
                "${NAME} or ${base64:user:NAME}",
                field=where,
            )
    return Injection(host, dict(injection.headers))


def _check_reachable(policy: Policy) -> None:
    """Refuse headers for a host that the rules do not let the sandbox reach."""
    if policy.egress is not Egress.DENY:
        return
    for one in policy.inject:
        if not any(covers(rule.removesuffix(f":{TLS_PORT}"), one.host) for rule in policy.allow):
            raise InvalidArgumentError(
                f"cannot use {{field}}: the rules do not allow {one.host}; add it to `allow`",
                field="network.inject",
            )


def plain_name(text: str) -> str | None:
    """Return a DNS name in lower case and ASCII, without a final dot; None if it is none."""
    name = text.removesuffix(".")
    if not name or len(name) > _NAME_MAX:
        return None
    if not name.isascii():
        if not _AMBIGUOUS.isdisjoint(name):
            return None
        try:
            name = name.encode("idna").decode()
        except UnicodeError:
            return None
    name = name.lower()
    labels = name.split(".")
    if len(name) > _NAME_MAX or _NUMBER.fullmatch(labels[-1]):  # the latter is an address
        return None
    is_name = all(len(one) <= _LABEL_MAX and _LABEL.fullmatch(one) for one in labels)
    return name if is_name else None


def _plain_rule(text: str, where: str) -> str:
    if _looks_like_range(text) or _is_v6(text):
        return _plain_range(text, where)
    rest, wild = text.removeprefix("*."), text.startswith("*.")
    name, colon, port = rest.partition(":")
    found = plain_name(name) if len(text) <= _TEXT_MAX else None
    if found is None or (colon and not _is_port(port)):
        raise InvalidArgumentError(
            f"cannot use {text[:80]!r} in {{field}}: a rule is a range (203.0.113.0/24), a name "
            "(example.com), all names below one (*.example.com), or a name with a port "
            "(example.com:22)",
            field=where,
        )
    if wild and "." not in found:
        raise InvalidArgumentError(
            f"cannot use {text[:80]!r} in {{field}}: a `*.` goes before a name with a dot, such as "
            "*.example.com; to allow everything, leave `egress` at `allow`",
            field=where,
        )
    ports = frozenset({int(port)}) if colon else NAME_PORTS
    return Pattern(found, is_wild=wild, ports=ports).text


def _plain_range(text: str, where: str = "network.deny") -> str:
    if not _looks_like_range(text):
        why = (
            "sandboxes have no IPv6, so no rule is needed"
            if _is_v6(text)
            else "it takes ranges alone (203.0.113.0/24): a name cannot be denied, because others "
            "can lead to the same address; deny everything, and allow what is needed"
        )
        raise InvalidArgumentError(f"cannot use {text[:80]!r} in {{field}}: {why}", field=where)
    try:
        return str(Network(text, strict=True))
    except ValueError as error:
        raise InvalidArgumentError(
            f"cannot use {text[:80]!r} in {{field}}: {error}", field=where
        ) from error


def _looks_like_range(text: str) -> bool:
    first = text.partition("/")[0]
    return bool(re.fullmatch(r"[0-9][0-9.]*", first)) and len(text) <= _TEXT_MAX


def _is_v6(text: str) -> bool:
    try:
        ipaddress.IPv6Network(text, strict=False)
    except ValueError:
        return False
    return True


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535


def _parsed(rule: str) -> Network | Pattern:
    """Return a rule in plain form, parsed."""
    if _looks_like_range(rule):
        return Network(rule)
    name, _, port = rule.removeprefix("*.").partition(":")
    ports = frozenset({int(port)}) if port else NAME_PORTS
    return Pattern(name, is_wild=rule.startswith("*."), ports=ports)


def _networks(rules: Iterable[Network | Pattern]) -> tuple[Network, ...]:
    return tuple(one for one in rules if isinstance(one, Network))


def _found(address: Address, networks: Sequence[Network]) -> Network | None:
    return next((one for one in networks if address in one), None)


def _within(address: Address, networks: Sequence[Network]) -> bool:
    return _found(address, networks) is not None
