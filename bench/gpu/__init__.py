"""`python -m bench gpu`."""
