"""Measures zerocopy against the other ways to give a model to Ray workers: `nox -s bench -- --help`."""
