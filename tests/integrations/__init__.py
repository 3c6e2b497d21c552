"""The adapters of hisa_jax/integrations inside the packages that they are for, each in an environment of its own."""
