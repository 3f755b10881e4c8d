"""Measures zerocopy against the other ways to give a model to Ray workers: `python -m zerocopy.bench --help`."""
