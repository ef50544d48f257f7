"""The operations of the agent, one module each."""
