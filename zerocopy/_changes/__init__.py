"""Detects changes of published and loaded pipelines."""
