"""The plugs: what stands behind the seams of core.contracts."""
