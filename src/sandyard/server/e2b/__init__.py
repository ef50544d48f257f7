"""The E2B API: the official SDKs of E2B work against it unmodified.

`control` creates and lists sandboxes, `envd` answers for the daemon that E2B has in each sandbox,
and `ports` leads to all other ports. It has its own host names, credentials and errors.
"""
