"""python -m hisa_jax.models COMMAND: the same as hisa-jax COMMAND."""

import sys

from hisa_jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
