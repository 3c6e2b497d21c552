"""`python -m bench quality`."""
