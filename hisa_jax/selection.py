"""What a selection is, for one query or for a batch of them."""

import dataclasses

import jax
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """The tokens each query may attend to. Leading axes are [B, T], or [T] for a packed batch.

    Attributes:
        indices: [..., topk] int32, chosen positions in their sequence, ascending, then -1.
        count: [...] int32, how many of `indices` are real.
        scores: [..., topk] float32, the indexer's score of each chosen token, -inf behind them; None unless asked for.
        blocks: [..., block_topk] int32, the kept blocks, ascending, then -1; None unless asked for.
    """

    indices: Array
    count: Array
    scores: Array | None = None
    blocks: Array | None = None
