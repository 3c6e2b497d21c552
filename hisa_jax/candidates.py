"""Lists of candidates that were published before, by another layer for instance: what is in none is not scored."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CandidateBlocks:
    """Of each query the blocks whose keys it may choose from.

    Attributes:
        ids: [..., m] int32 block ids in any order, -1 anywhere; one that is given twice counts once.
        block_size: keys of a block, from a multiple of it on; static. 1: ids are those of keys, tokens or entries.

    Example:
        >>> q, k, w = jnp.ones((1, 1, 4, 32)), jnp.ones((1, 64, 32)), jnp.ones((1, 1, 4))
        >>> source = hj.BlockSparse(topk=16, block_size=8, keep_first=0, scored_by="max")
        >>> blocks = hj.select(q, k, w, source, return_blocks=True).blocks
        >>> listed = hj.CandidateBlocks(blocks, 8)
        >>> hj.select(q, k, w, hj.Dsa(topk=4), candidates=listed).indices.tolist()
        [[[0, 1, 2, 3]]]
    """

    ids: Array
    block_size: int = dataclasses.field(default=1, metadata=dict(static=True))

    def in_order(self, max_keys: int) -> "CandidateBlocks":
        """Each block that there can be once, ascending, then -1; none larger than all keys together."""
        n = -(-max_keys // self.block_size)
        ids = jnp.sort(jnp.where((self.ids >= 0) & (self.ids < n), self.ids, n), axis=-1)
        is_again = jnp.concatenate([jnp.zeros_like(ids[..., :1], bool), ids[..., 1:] == ids[..., :-1]], axis=-1)
        ids = jnp.sort(jnp.where(is_again, n, ids), axis=-1)
        return CandidateBlocks(jnp.where(ids < n, ids, -1), min(self.block_size, max(max_keys, 1)))
