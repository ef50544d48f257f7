"""The agent inside a machine: standard library only, reached by core.wire and by nothing else."""
