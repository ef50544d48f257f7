"""Hypervisors, one folder each, behind one contract. No driver imports another."""
