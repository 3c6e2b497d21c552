"""Device code of `combine`: a few rows a program."""

import functools

import jax.numpy as jnp

from hisa_jax.kernels_pallas.types import Ref


def combine_body(partial_ref: Ref, lse_ref: Ref, o_ref: Ref, whole_lse_ref: Ref) -> None:
    # One program:   lse [splits, rows] -> weights of sum 1 -> o [rows, V] = sum of weight * partial [splits, rows, V]
    #
    # Texts, not loops: so all parts are on their way at once, and there may be any number of them.
    lse = [lse_ref[i] for i in range(lse_ref.shape[0])]
    highest = functools.reduce(jnp.maximum, lse)  # Triton's drops NaN, which the weights bring back
    highest = jnp.where(highest == -jnp.inf, 0.0, highest)  # where nothing is listed
    weights = [jnp.exp(x - highest) for x in lse]
    total = sum(weights[1:], weights[0])
    o = jnp.zeros(o_ref.shape, jnp.float32)
    for i, weight in enumerate(weights):
        o += weight[:, None] * partial_ref[i]
    some = jnp.where(total == 0.0, 1.0, total)
    o_ref[...] = (o / some[:, None]).astype(o_ref.dtype)
    whole_lse_ref[...] = jnp.where(total == 0.0, -jnp.inf, jnp.log(some) + highest)
