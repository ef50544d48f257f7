"""Machines that are none, and what a node needs for them: for tests, and for `driver = "fake"`."""
