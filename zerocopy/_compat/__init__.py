"""Holds all behavior of Python, torch, Ray and Linux that they do not promise."""
