"""Requests and answers as HTTP carries them, a resource each."""
