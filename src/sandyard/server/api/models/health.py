"""Health as HTTP carries it."""

from typing import Literal

from sandyard.server.api.models.base import Model


class Health(Model):
    """Whether the process is up, or ready; `missing` says what keeps it from being ready, and
    `limited` what sandboxes have to do without."""

    status: Literal["ok", "unready"]
    missing: list[str] = []
    limited: list[str] = []
