"""HTTP: routes, request and response models, the error envelope. No rules live here."""

from sandyard.server.api.http import Services, make_api

__all__ = ["Services", "make_api"]
