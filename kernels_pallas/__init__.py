"""Pallas kernels for the hierarchical indexer: one folder a backend, the same stage names in each (see README.md)."""
