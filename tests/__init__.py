"""Tests, and the programs that they start.

Tracing makes many objects and few cycles: to look for cycles seldom takes a sixth off what the tests of a file take.
"""

import gc

gc.set_threshold(200_000, 50, 1000)
