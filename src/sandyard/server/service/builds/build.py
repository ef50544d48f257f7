"""Builds the services about templates."""

from dataclasses import dataclass
from pathlib import Path

from sandyard.server.service.builds.building import Building
from sandyard.server.service.builds.builds import Builds
from sandyard.server.service.builds.cache import BuildCache
from sandyard.server.service.builds.credentials import RegistryCredentials
from sandyard.server.service.builds.removal import Removal
from sandyard.server.service.builds.tools import BuildLimits, BuildTools
from sandyard.server.service.builds.uploads import Uploads
from sandyard.server.service.sandboxes.build import SandboxServices
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.service.signers import Signers


@dataclass(frozen=True)
class TemplateServices:
    """The services; `building` is to be run."""

    builds: Builds
    uploads: Uploads
    credentials: RegistryCredentials
    building: Building


def build_templates(
    platform: Platform,
    *,
    sandboxes: SandboxServices,
    uploads_dir: Path,
    upload_max: int,
    limits: BuildLimits,
) -> TemplateServices:
    """Return the services. Uploads are kept in `uploads_dir`."""
    signers = Signers(platform.store, platform.clock)
    uploads = Uploads(platform, signers, uploads_dir, size_max=upload_max)
    credentials = RegistryCredentials(platform)
    tools = BuildTools(
        platform=platform,
        sandboxes=sandboxes,
        uploads=uploads,
        credentials=credentials,
        cache=BuildCache(sandboxes.snapshots, platform.clock, size_max=limits.cache_bytes),
        removal=Removal(platform, uploads),
        limits=limits,
    )
    return TemplateServices(
        builds=Builds(platform, platform.templates, uploads, credentials),
        uploads=uploads,
        credentials=credentials,
        building=Building(tools),
    )
