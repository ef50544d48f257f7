"""DNS answers for a sandbox with rules, and the addresses that they open."""

import asyncio
import logging
from dataclasses import dataclass

import dns.exception
import dns.message
import dns.rcode
import dns.rdatatype

from sandyard.server.core.egress import Address, Judgement, Rules, plain_name
from sandyard.server.egress.dns import REFUSED, SERVFAIL, Query, refusal
from sandyard.server.egress.journal import Journal
from sandyard.server.egress.resolver import Found, Resolver, UnresolvedError

log = logging.getLogger(__name__)

_GRANTED_MIN_S, _GRANTED_MAX_S, _GRANTED_MAX = 60.0, 3600.0, 64
_NAMES_MAX = 2048
_NOERROR = 0
# HTTPS and SVCB records (RFC 9460) carry keys that encrypt the server's name, by which rules judge.
_ENCRYPTING = frozenset({64, 65})
_ANY = 255


@dataclass
class _Grant:
    name: str
    rule: str
    until: float


class Known:
    """DNS answers that the sandbox received: addresses that rules like `name:port` open, and the
    names of addresses, for the journal."""

    def __init__(self) -> None:
        self._grants: dict[tuple[Address, int], _Grant] = {}
        self._names: dict[Address, str] = {}

    def learn(self, name: str, found: Found, rules: Rules) -> None:
        """Note the addresses of a name; private ones open nothing."""
        now = asyncio.get_running_loop().time()
        until = now + min(max(found.ttl_s, _GRANTED_MIN_S), _GRANTED_MAX_S)
        addresses = [one for one in found.addresses if not rules.is_private(one)][:_GRANTED_MAX]
        for address in addresses:
            self._names.pop(address, None)
            self._names[address] = name
        while len(self._names) > _NAMES_MAX:
            del self._names[next(iter(self._names))]
        for port, rule in rules.ports_of(name):
            for address in addresses:
                self._grants.pop((address, port), None)
                self._grants[address, port] = _Grant(name, rule, until)
            granted = [key for key, one in self._grants.items() if one.rule == rule]
            for key in granted[:-_GRANTED_MAX]:
                del self._grants[key]
        for key in [key for key, one in self._grants.items() if one.until < now]:
            del self._grants[key]

    def is_granted(self, address: Address, port: int, rules: Rules) -> Judgement | None:
        """Judge an address by the DNS answers for names with ports."""
        grant = self._grants.get((address, port))
        if grant is None or grant.until < asyncio.get_running_loop().time():
            return None
        # The rules may have changed since.
        is_open = (port, grant.rule) in rules.ports_of(grant.name)
        return Judgement(may_pass=True, rule=grant.rule) if is_open else None

    def name_of(self, address: Address) -> str:
        """Return the name that the sandbox knows an address by, or nothing."""
        return self._names.get(address, "")


class RuledAnswers:
    """See egress.dns.Answers: answers to what the rules allow."""

    def __init__(self, resolver: Resolver, known: Known, journal: Journal, rules: Rules) -> None:
        self.rules = rules
        self._resolver = resolver
        self._known = known
        self._journal = journal

    async def __call__(self, message: bytes, query: Query, *, over_tcp: bool) -> bytes:
        """See egress.dns.Answers."""
        name = plain_name(query.name)
        judgement = self.rules.may_resolve(name or "")
        # A name that is not plain could be read as another by a resolver.
        is_odd = (name is None and not query.is_root) or query.kind == _ANY or not query.is_usual
        if not judgement.may_pass or is_odd:
            rule = judgement.rule if not judgement.may_pass else "unusual question"
            self._journal.write(
                {"verdict": "refused", "rule": rule, "name": query.name[:253], "port": 53}
            )
            return refusal(message, REFUSED, query.question)
        if query.kind in _ENCRYPTING:
            return refusal(message, _NOERROR, query.question)
        try:
            found = await self._resolver.find(name or ".", query.kind)
            answer = _answer(message, found)
        except (UnresolvedError, dns.exception.DNSException):
            return refusal(message, SERVFAIL, query.question)
        except Exception:  # whatever a guest asks, this goes on
            log.exception("a question cannot be answered")
            return refusal(message, SERVFAIL, query.question)
        if name is not None and query.kind == dns.rdatatype.A:
            self._known.learn(name, found, self.rules)
        return answer


def _answer(message: bytes, found: Found) -> bytes:
    answer = dns.message.make_response(dns.message.from_wire(message), recursion_available=True)
    answer.set_rcode(dns.rcode.Rcode(found.rcode))
    answer.answer = list(found.records)
    return answer.to_wire(max_size=65535)
