"""Compares zerocopy with the other ways to give a model to Ray workers. See `nox -s bench -- --help`."""
