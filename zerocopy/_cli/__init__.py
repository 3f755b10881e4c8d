"""Runs zerocopy from a terminal."""
