"""Tests of the reference that the library ships, `hisa_jax.testing.oracle`; tests call it by this name."""

from hisa_jax.testing.oracle import *  # noqa: F403
from hisa_jax.testing.oracle import __all__ as __all__
