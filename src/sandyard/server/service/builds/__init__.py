"""Builds of organizations' templates: what is requested, how it is carried out, and uploads."""
