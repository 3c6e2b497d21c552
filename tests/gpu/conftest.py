"""Setup for the kernel tests."""

import os

# GPU interpret mode blocks a thread of XLA's CPU pool for every warp-group that waits: fewer threads than
# warp-groups, as on a machine of two cores, and it stands still. Read when the CPU backend starts.
os.environ.setdefault("NPROC", "32")
