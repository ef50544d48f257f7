"""Makes what tests with machines would wait for: templates, and the environments of E2B's SDKs.

To be run beside other work: `python -m tests.support.prepare`.
"""

import asyncio
import signal

from sandyard.server.app.wiring import builder_of
from tests.support.e2b_sdks import node_with_sdk, python_with
from tests.support.images import CACHE, cached_settings, one_at_a_time

_IN_ORDER_OF_USE = (
    "builder",
    "e2b-base",
    "code-interpreter",
    "docker-ubuntu",
    "desktop-ubuntu",
    "base-ubuntu",
)


def main() -> None:
    """Make everything that is not in the cache."""
    builder = builder_of(cached_settings(CACHE / "home-large"))
    with one_at_a_time():  # other tests build this one, too
        asyncio.run(builder.build("base-minimal", progress=print))
    for slug in _IN_ORDER_OF_USE:
        asyncio.run(builder.build(slug, progress=print))
    python_with("oldest")
    node_with_sdk()


if __name__ == "__main__":
    # Whoever starts this ends it so, and nothing is to be left of a half build.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
