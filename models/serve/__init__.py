"""A model served by OpenAI's interface: `hisa-jax serve`. Needs the extra `serve`."""
