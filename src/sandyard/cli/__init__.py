"""The command line: `sandyard …`."""

import sys

# httpx imports its own command line if click and rich are installed, which takes a fifth of the
# time that ours takes to start.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
