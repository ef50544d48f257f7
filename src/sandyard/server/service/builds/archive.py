"""Chooses the image in an unpacked archive: an OCI layout, or what `docker save` writes.

A build runs this file in its machine, by a Python that has only a part of the standard library. It
writes the paths of the image's layers to `layers`, and its configuration to `config.json`.
"""

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

_NEEDED = ("linux", "amd64", "")
_READ_MAX = 4 << 20
_LOOKED_AT_MAX = 1000


def _read(path: str) -> Any:
    with open(path, "rb") as file:
        return json.loads(file.read(_READ_MAX))


def _blob(digest: str) -> str:
    return "image/blobs/" + digest.replace(":", "/", 1)


def _images() -> Iterator[tuple[str, list[str]]]:
    """Yield the configuration of each image, and its layers, as paths."""
    if not os.path.exists("image/oci-layout"):
        for one in _read("image/manifest.json"):
            yield f"image/{one['Config']}", [f"image/{name}" for name in one["Layers"]]
        return
    left = _read("image/index.json")["manifests"]
    for _ in range(_LOOKED_AT_MAX):
        if not left:
            return
        one = left.pop(0)
        if not os.path.exists(_blob(one["digest"])):
            continue  # of a platform that was not saved
        found = _read(_blob(one["digest"]))
        if "manifests" in found:
            left[:0] = found["manifests"]
        elif "vnd.docker.reference.type" not in (one.get("annotations") or {}):
            yield (
                _blob(found["config"]["digest"]),
                [_blob(two["digest"]) for two in found["layers"]],
            )


def main() -> None:
    """Choose the image for sandboxes. Without one, leave the configuration of another, which is
    refused by its platform."""
    every: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for config, layers in _images():  # by configuration: two tags of one image are one
        about = _read(config)
        platform = (
            about.get("os") or "linux",
            about.get("architecture") or "amd64",
            about.get("variant") or "",
        )
        every.setdefault(platform, {})[config] = layers
    ours = [platform for platform in every if platform[:2] == _NEEDED[:2]]
    chosen = _NEEDED if _NEEDED in ours else next(iter(ours or every), None)
    found = {} if chosen is None else every[chosen]
    if len(found) != 1:
        sys.exit(f"the archive has {len(found)} images, and one is needed: save one alone")
    ((config, layers),) = found.items()
    os.replace(config, "config.json")
    with open("layers", "w") as file:
        file.writelines(f"{one}\n" for one in layers)


if __name__ == "__main__":
    main()
