"""Machines: one owner each of its record, its files and its process."""
