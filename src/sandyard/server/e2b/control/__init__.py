"""The control API: sandboxes, snapshots and templates, as E2B's OpenAPI description has them."""
