"""The client for asyncio. `_sync` is generated from it by scripts/unasync, except for the modules
that are written in both ways: `concurrency`, `local` and `terminals`."""
