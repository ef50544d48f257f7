"""Builds the reconciler."""

from datetime import datetime

from sandyard.server.service.reconcile.idle import Idleness
from sandyard.server.service.reconcile.reconciler import Pace, Reconciler
from sandyard.server.service.reconcile.revoking import Revoking
from sandyard.server.service.reconcile.shares import Shares
from sandyard.server.service.reconcile.work import Work
from sandyard.server.service.sandboxes.platform import Platform


def build_reconciler(platform: Platform, *, pace: Pace, away_since: datetime | None) -> Reconciler:
    """Return the reconciler. `away_since` is when a server last ran, if none has run since."""
    store, tunnel, clock = platform.store, platform.tunnel, platform.clock
    roster = platform.roster
    return Reconciler(
        platform,
        work=Work(platform, start_limit_s=pace.start_limit_s),
        idleness=Idleness(store=store, tunnel=tunnel, clock=clock),
        revoking=Revoking(store=store, tunnel=tunnel, clock=clock),
        pace=pace,
        shares=None if roster is None else Shares(platform.server_id, store, roster),
        away_since=away_since,
    )
