"""`python -m bench demo`."""
