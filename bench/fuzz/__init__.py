"""`python -m bench fuzz`."""
