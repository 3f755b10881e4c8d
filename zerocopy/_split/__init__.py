"""Splits an object into its skeleton and its tensors."""
