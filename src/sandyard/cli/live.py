"""`sandyard top`: what sandboxes do now, again and again."""

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.table import Table

from sandyard.cli.output import plain, show_table
from sandyard.cli.sandbox import open_client
from sandyard.client import Sandbox, Sandyard, SandyardError

_COLUMNS = ("name", "status", "CPU %", "memory", "disk", "up", "last use", "id")
_LEFT_OUT = ("id", "last use", "up", "disk", "status")
_AT_ONCE = 8


def top(
    every: Annotated[float, typer.Option(help="Seconds between updates.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print once and exit.")] = False,
) -> None:
    """Show the resource usage of running sandboxes, busiest first, until Ctrl-C.

    This does not count as use of a sandbox and does not keep it from being paused.
    """
    if not 0.2 <= every <= 3600:
        raise typer.BadParameter("--every is 0.2 to 3600 seconds")
    with open_client() as client, ThreadPoolExecutor(_AT_ONCE) as threads:
        if once or not sys.stdout.isatty():
            show_table(_COLUMNS, _rows(client, threads))
            return
        with Live(console=Console(), screen=True, auto_refresh=False) as live:
            while True:
                live.update(_table(_rows(client, threads), live.console.width), refresh=True)
                time.sleep(every)


def _table(rows: Sequence[tuple[str, ...]], width: int) -> Table:
    """Return a table of as many columns as fit, the least important left out first."""
    cells = [tuple(map(plain, row)) for row in rows]
    widths = [max(map(cell_len, column)) + 2 for column in zip(_COLUMNS, *cells, strict=True)]
    kept = set(range(len(_COLUMNS)))
    for name in _LEFT_OUT:
        if sum(widths[one] for one in kept) > width:
            kept.discard(_COLUMNS.index(name))
    table = Table(box=None)
    for number in sorted(kept):
        table.add_column(_COLUMNS[number], no_wrap=True)
    for row in cells:
        table.add_row(*(row[number] for number in sorted(kept)))
    return table


def _rows(client: Sandyard, threads: ThreadPoolExecutor) -> list[tuple[str, ...]]:
    found = list(threads.map(lambda one: (one, _figures(client, one)), client.list()))
    found.sort(key=lambda pair: -(pair[1] or {}).get("cpuPercent", -1.0))
    return [_row(one, figures) for one, figures in found]


def _figures(client: Sandyard, one: Sandbox) -> dict[str, float] | None:
    if one.status != "running":
        return None
    try:
        return dict(client.stats(one.id))
    except SandyardError:  # paused or gone meanwhile
        return None


def _row(one: Sandbox, figures: dict[str, float] | None) -> tuple[str, ...]:
    about = (one.name or "", one.status)
    last = str(one.raw.get("lastActivityAt") or "")[:19].replace("T", " ")
    if figures is None:
        return (*about, "", "", "", "", last, one.id)
    return (
        *about,
        f"{figures['cpuPercent']:.1f}",
        _of(figures["memoryUsedBytes"], figures["memoryTotalBytes"], 2**20, "MiB"),
        _of(figures["diskUsedBytes"], figures["diskTotalBytes"], 2**30, "GiB"),
        _span(figures["uptime"]),
        last,
        one.id,
    )


def _of(used: float, total: float, unit: int, name: str) -> str:
    digits = 1 if unit > 2**20 else 0
    return f"{used / unit:.{digits}f}/{total / unit:.{digits}f} {name}"


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
