"""What builds are carried out with."""

from dataclasses import dataclass

from sandyard.server.core.shapes import Shape
from sandyard.server.service.builds.cache import BuildCache
from sandyard.server.service.builds.credentials import RegistryCredentials
from sandyard.server.service.builds.removal import Removal
from sandyard.server.service.builds.uploads import Uploads
from sandyard.server.service.sandboxes.build import SandboxServices
from sandyard.server.service.sandboxes.platform import Platform


@dataclass(frozen=True)
class BuildLimits:
    """The limits of builds: how many at once on this server, their duration, the size of their
    logs, of their root file systems and of what they keep for later ones, and the shape of the
    machine that unpacks."""

    at_once: int
    limit_s: float
    log_bytes: int
    size_max: int
    cache_bytes: int
    builder: Shape


@dataclass(frozen=True)
class BuildTools:
    """The services that builds use, and their limits."""

    platform: Platform
    sandboxes: SandboxServices
    uploads: Uploads
    credentials: RegistryCredentials
    cache: BuildCache
    removal: Removal
    limits: BuildLimits
