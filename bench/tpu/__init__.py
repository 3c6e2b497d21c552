"""`python -m bench tpu`."""
