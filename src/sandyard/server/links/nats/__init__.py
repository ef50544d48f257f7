"""Requests from control planes to nodes, and hints among control planes, over core NATS."""
