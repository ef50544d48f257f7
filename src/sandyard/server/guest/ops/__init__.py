"""What the agent does, an operation a file."""
