"""The client in one of its two forms. scripts/unasync generates the synchronous one from the other,
except for the modules `concurrency`, `local` and `terminals`."""
