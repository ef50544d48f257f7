"""Words between control planes and nodes, and hints among control planes, by core NATS."""
