"""Templates for tests: built once, kept by content in a cache that runs share."""

import asyncio
import os
from pathlib import Path

from sandyard.server.app.settings import NodeSettings, Settings
from sandyard.server.app.wiring import builder_of
from sandyard.server.node.images.images import Image

CACHE = Path(os.environ.get("SANDYARD_TEST_CACHE", "/var/cache/sandyard-tests"))
_built: dict[str, Image] = {}


def cached_settings(home: Path) -> Settings:
    """Return settings whose images and packages lie in the cache."""
    node = NodeSettings(images_dir=CACHE / "images", cache_dir=CACHE / "packages")
    return Settings(home=home, node=node)


def cache_environment() -> dict[str, str]:
    """Return the same as an environment."""
    return {
        "SANDYARD_NODE__IMAGES_DIR": str(CACHE / "images"),
        "SANDYARD_NODE__CACHE_DIR": str(CACHE / "packages"),
    }


def minimal_image() -> Image:
    """Return the image of base-minimal, built if it is not up to date."""
    if "base-minimal" not in _built:
        builder = builder_of(cached_settings(CACHE / "home"))
        # In a thread, for callers inside a loop: building runs a loop of its own.
        import threading

        def build() -> None:
            _built["base-minimal"] = asyncio.run(
                builder.build("base-minimal", progress=lambda _: None)
            )

        thread = threading.Thread(target=build)
        thread.start()
        thread.join()
    return _built["base-minimal"]
