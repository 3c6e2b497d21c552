"""`python -m bench peers`: the kernels beside the best public ones, on the same inputs in one process."""
