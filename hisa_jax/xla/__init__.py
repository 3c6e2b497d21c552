"""Implementation "xla": the stages in plain JAX."""
