"""Makes what is so agree with what should be."""
