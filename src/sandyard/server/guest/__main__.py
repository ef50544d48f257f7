"""Starts the agent; PID 1 runs this and restarts it if it ends."""

import sys

# asyncio and hmac load OpenSSL if they can: a fifth of a cold start, for nothing the agent uses.
for unwanted in ("ssl", "_hashlib"):
    sys.modules[unwanted] = None  # type: ignore[assignment]  # makes importing it fail

from sandyard.server.guest.agent import main  # noqa: E402

main()
