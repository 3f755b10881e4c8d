"""Runs actors and tasks, and handles their calls in the workers."""
