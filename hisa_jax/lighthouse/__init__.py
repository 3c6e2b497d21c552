"""Lighthouse attention: training over pooled queries, keys and values. `attention.py` has the public functions."""
