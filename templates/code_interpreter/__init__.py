"""The code interpreter: runs code for E2B's SDKs, in sandboxes of the template of that name."""
