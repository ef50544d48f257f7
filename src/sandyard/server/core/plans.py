"""Plans: what an organization may do in a minute, and have at one time."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

LIMITS = {
    "requestsPerMinute": "requests_per_minute",
    "sandboxes": "sandboxes",
    "vcpus": "vcpus",
    "memoryGb": "memory_gb",
    "diskGb": "disk_gb",
    "storageGb": "storage_gb",
    "testSandboxes": "test_sandboxes",
    "snapshots": "snapshots",
    "snapshotGb": "snapshot_gb",
    "testSnapshots": "test_snapshots",
    "templates": "templates",
    "templateVersions": "template_versions",
    "templateGb": "template_gb",
    "builds": "builds",
}
"""What can be limited, by the name that clients see."""


@dataclass(frozen=True)
class Plan:
    """The limits of an organization; None is no limit.

    `sandboxes`, `vcpus` and `memory_gb` bound what runs at one time, `disk_gb` all that is not
    deleted, `storage_gb` what is in workspaces, `test_sandboxes` those of test keys. `snapshots`
    and `snapshot_gb` bound the snapshots that are kept, and `test_snapshots` how many of them are
    of test keys' sandboxes, which cost nothing. `templates`, `template_versions` and `template_gb`
    bound the organization's own templates, and `builds` those in progress at one time: others wait.
    """

    requests_per_minute: int | None = None
    sandboxes: int | None = None
    vcpus: int | None = None
    memory_gb: int | None = None
    disk_gb: int | None = None
    storage_gb: int | None = None
    test_sandboxes: int | None = 2
    snapshots: int | None = None
    snapshot_gb: int | None = None
    test_snapshots: int | None = 2
    templates: int | None = None
    template_versions: int | None = None
    template_gb: int | None = None
    builds: int | None = 2

    def changed_by(self, limits: Mapping[str, int]) -> "Plan":
        """Return the plan with an organization's own limits in the place of its."""
        own = {LIMITS[name]: value for name, value in limits.items() if name in LIMITS}
        return replace(self, **own)
