"""The RunTools API: routes, request and response models, the error envelope."""

from sandyard.server.api.http import make_api

__all__ = ["make_api"]
