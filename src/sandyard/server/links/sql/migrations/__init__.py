"""Migrations: only forward, never edited once released."""
