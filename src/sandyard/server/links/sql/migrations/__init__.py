"""Migrations: they only go forward, and are never edited once released."""
