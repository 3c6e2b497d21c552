"""`python -m bench renew`: measures what the documents publish of NVIDIA GPUs, in the minutes that there are."""
