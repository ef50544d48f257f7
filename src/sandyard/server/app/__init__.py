"""Settings, logging, metrics, wiring: the only room that knows all others."""
