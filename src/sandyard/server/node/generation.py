"""Counts the changes of a node's state, so that an unchanged report need not be fetched."""

from dataclasses import replace

from sandyard.server.core.contracts.node import NodeReport


class Generation:
    """Numbers the changes of a node's report."""

    def __init__(self) -> None:
        self._count = 0
        self._last: tuple[object, ...] = ()

    def of(self, report: NodeReport) -> NodeReport:
        """Return a report with its generation. Free capacity is ignored, because it changes
        constantly."""
        facts: tuple[object, ...] = (
            report.machines,
            report.snapshots,
            report.missing,
            report.is_short_of_memory,
        )
        facts += (report.templates, report.versions)
        if facts != self._last:
            self._count += 1
            self._last = facts
        return replace(report, generation=self._count)
