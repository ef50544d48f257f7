"""The command line: `sandyard …`."""
