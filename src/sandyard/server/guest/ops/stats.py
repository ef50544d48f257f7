"""STATS: the machine's resource usage, and the CPU usage of users' programs."""

from sandyard.server.core import ops
from sandyard.server.guest import system
from sandyard.server.guest.context import Context


async def stats(context: Context, wish: ops.Stats) -> ops.Figures:
    """See core.ops.Stats."""
    if wish.window_s is not None:
        recent = await context.load.recent_percent(wish.window_s)
        return ops.Figures(recent_cpu_percent=recent)
    figures = system.stats(context.root_fd)
    since_ms, samples = wish.since_ms, tuple(context.history.samples)
    earlier = () if since_ms is None else tuple(one for one in samples if one.at_ms >= since_ms)
    cpu_percent = await context.load.percent_now()
    return ops.Figures(cpu_percent=cpu_percent, earlier=earlier, **figures)
