"""The authorities of an installation, while they are replaced."""

from datetime import UTC, datetime, timedelta

import pytest

from sandyard.server.core.contracts.cluster import Application
from sandyard.server.core.errors import ConflictError
from sandyard.server.links.identities import new_request
from sandyard.server.links.installation import Installation, InstallationRegistrar
from sandyard.server.links.nats.config import config_of
from sandyard.server.links.nats.tokens import Key, Role

NOW = datetime(2026, 5, 1, tzinfo=UTC)


def test_each_step_is_stored_and_read_back() -> None:
    first = Installation.new(NOW)
    added = first.with_added(NOW + timedelta(hours=1))
    used = added.with_used(NOW + timedelta(hours=2))
    last = used.with_removed(NOW + timedelta(hours=3))
    for one in (first, added, used, last):
        assert Installation.of(one.values()) == one
    assert added.added is not None
    new, new_nats = added.added
    old, old_nats = first.authority.certificate, first.nats.certificate
    assert (added.authority, added.trusted) == (first.authority, old + new.certificate)
    assert (used.authority, used.trusted) == (new, new.certificate + old)
    assert (used.nats, used.nats_trusted) == (new_nats, new_nats.certificate + old_nats)
    assert (last.trusted, last.nats_trusted) == (new.certificate, new_nats.certificate)
    assert (last.id, last.operator, last.account) == (first.id, first.operator, first.account)
    # What was added can be taken back.
    assert added.with_removed(NOW).trusted == first.trusted


def test_steps_out_of_order_are_refused() -> None:
    first = Installation.new(NOW)
    added = first.with_added(NOW)
    used = added.with_used(NOW)
    for work, message in (
        (first.with_used, "none was added"),
        (first.with_removed, "only the one in use"),
        (added.with_added, "is not over"),
        (used.with_added, "is not over"),
        (used.with_used, "none was added"),
    ):
        with pytest.raises(ConflictError, match=message):
            work(NOW)


def test_what_is_issued_tells_which_authorities_it_trusts() -> None:
    first = Installation.new(NOW)
    added = first.with_added(NOW)
    registrar = InstallationRegistrar(first, (), lambda: NOW)
    key = Key.new(Role.USER).name
    seen = set()
    for one in (first, added, added.with_used(NOW), added.with_used(NOW).with_removed(NOW)):
        registrar.installation = one
        identity = registrar.identity_of("node", Application(new_request()[1].decode(), key))
        assert identity.trust == registrar.trust
        assert (identity.authority + identity.also_trusted).encode() == one.trusted
        seen.add(registrar.trust)
    assert len(seen) == 4


def test_a_configuration_of_nats_is_always_the_same() -> None:
    """A server that reads it anew refuses another operator."""
    own = Installation.new(NOW)
    texts = {
        config_of(installation=own.id, operator=own.operator, account=own.account, host="h", port=1)
        for _ in range(2)
    }
    assert len(texts) == 1
