"""Sandyard: real virtual machines for agents and people, self-hosted."""
