"""Writes a live pipeline into the store."""
