"""Functions of one's own for tests. Blocks are Quest's (arXiv 2406.10774), tokens are chosen by their distance.

A block is the least and the greatest of its keys, feature by feature, and scores the most that a key in between could.
"""

import jax.numpy as jnp


def bounds(keys):
    return jnp.concatenate([keys.min(0), keys.max(0)])


def most(q, blocks, w):
    least, greatest = jnp.split(blocks, 2, axis=1)
    most = jnp.maximum(q[:, None] * least[None], q[:, None] * greatest[None]).sum(2)  # [H, n]
    return (w[:, None] * most).sum(0)


def distance(q, keys, w):
    return -(w[:, None] ** 2 * jnp.abs(q[:, None] - keys[None]).sum(2)).sum(0)


FUNCTIONS = dict(pool=bounds, block_score=most, token_score=distance)
