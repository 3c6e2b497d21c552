"""`python -m bench serve`."""
