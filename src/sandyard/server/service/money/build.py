"""Builds the services about money."""

from dataclasses import dataclass

from sandyard.server.core.contracts.payments import Payments
from sandyard.server.service.money.billing import Billing
from sandyard.server.service.money.metering import Meter
from sandyard.server.service.sandboxes.platform import Platform


@dataclass(frozen=True)
class Money:
    """The services; `meter` is to be run."""

    billing: Billing
    meter: Meter


def build_money(platform: Platform, *, payments: Payments) -> Money:
    """Return the services on a payment provider."""
    return Money(
        billing=Billing(platform, payments=payments),
        meter=Meter(
            store=platform.store,
            lifecycle=platform.lifecycle,
            payments=payments,
            clock=platform.clock,
            prices=platform.prices,
            server_id=platform.server_id,
            enforces=platform.enforces,
        ),
    )
