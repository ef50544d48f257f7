"""What the official SDKs of E2B are driven with."""
