"""Templates: their definitions, how they are built, and the resulting images."""
