"""Hypervisors, one folder each, behind one contract; they do not know each other."""
