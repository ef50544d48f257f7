"""Builds the services about workspaces."""

from concurrent.futures import Executor
from dataclasses import dataclass

from sandyard.server.core.contracts.volumes import Volumes
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.service.workspaces.files import WorkspaceFiles
from sandyard.server.service.workspaces.workspaces import Workspaces


@dataclass(frozen=True)
class WorkspaceServices:
    """The services; `workspaces` is to be run."""

    workspaces: Workspaces
    files: WorkspaceFiles


def build_workspaces(
    platform: Platform,
    *,
    volumes: Volumes,
    threads: Executor,
    quota_bytes: int,
    upload_max: int,
) -> WorkspaceServices:
    """Return the services on volumes; `threads` do the file system's work."""
    workspaces = Workspaces(platform, volumes=volumes, quota_bytes=quota_bytes)
    files = WorkspaceFiles(
        workspaces=workspaces,
        volumes=volumes,
        platform=platform,
        threads=threads,
        upload_max=upload_max,
    )
    return WorkspaceServices(workspaces, files)
