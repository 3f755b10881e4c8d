"""Writes bytes into Ray's object store, and finds and maps them there."""
