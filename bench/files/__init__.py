"""`python -m bench files`."""
