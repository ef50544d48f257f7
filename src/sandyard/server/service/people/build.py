"""Builds the services about people: who they are, and what they may do."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sandyard.server.service.people.access import Access
from sandyard.server.service.people.api_keys import ApiKeys
from sandyard.server.service.people.logins import Logins
from sandyard.server.service.people.organizations import Organizations, SignUp
from sandyard.server.service.people.rates import Rates
from sandyard.server.service.people.sign_in import SignIn
from sandyard.server.service.people.ssh_keys import CheckPublicKey, SshKeys
from sandyard.server.service.sandboxes.platform import Platform


@dataclass(frozen=True)
class People:
    """The services."""

    access: Access
    rates: Rates
    organizations: Organizations
    api_keys: ApiKeys
    ssh_keys: SshKeys
    logins: Logins


def build_people(
    platform: Platform,
    *,
    sign_in: SignIn | None,
    sign_up: SignUp,
    failures_per_minute: int,
    check_password: Callable[[str, str | None], Awaitable[bool]],
    check_public_key: CheckPublicKey,
) -> People:
    """Return the services; without `sign_in`, session tokens are refused."""
    store, clock, repeats = platform.store, platform.clock, platform.repeats
    access = Access(store, clock, sign_in)
    rates = Rates(clock, platform.plans, failures_per_minute=failures_per_minute)
    return People(
        access=access,
        rates=rates,
        organizations=Organizations(store=store, repeats=repeats, clock=clock, sign_up=sign_up),
        api_keys=ApiKeys(store, clock),
        ssh_keys=SshKeys(store, repeats, clock, check_public_key),
        logins=Logins(
            store=store,
            register=platform.register,
            access=access,
            rates=rates,
            clock=clock,
            check_password=check_password,
        ),
    )
