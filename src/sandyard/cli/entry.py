"""The entry of `sandyard`, which says so if what the command line needs is not installed."""

import sys


def main() -> None:
    """Run the command line, if what it needs is installed."""
    try:
        from sandyard.cli.main import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sandyard"):
            raise
        sys.stderr.write(
            f"error: the command line needs its extra ({error.name} is missing): "
            "pip install 'sandyard[cli]'\n"
        )
        sys.exit(1)
    run()
