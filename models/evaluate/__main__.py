"""lm-eval's own command with this library's models: python -m hisa_jax.models.evaluate run --model hisa_jax ..."""

from hisa_jax.checks import optional_packages

if __name__ == "__main__":
    from hisa_jax.models.evaluate import harness  # noqa: F401  registers "hisa_jax"

    with optional_packages():
        from lm_eval.__main__ import cli_evaluate
    cli_evaluate()
