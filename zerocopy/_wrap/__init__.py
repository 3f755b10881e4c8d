"""Shares objects whose classes the user did not write."""
