"""What a user writes between the peers' kernels to make an indexer of them, in torch, for `torch.compile`.

Shapes: M queries, each with e [M] int32 visible tokens; blocks of B tokens; n blocks, of which m are kept, -1 for none.
"""

import functools
from typing import Any

PAGE = 64  # tokens of a page of DeepGEMM
_E4M3_MAX = 448.0


class Glue:
    """The functions, compiled for the shapes of one row: torch compiles a function eight times at most.

    Args:
        torch: the module.
        compiled: False runs them as they are.
    """

    def __init__(self, torch: Any, *, compiled: bool = True):
        if compiled:
            torch._dynamo.reset()
        # With `fullgraph` an error, and no silent run as they are, where that limit is reached after all.
        wrap = functools.partial(torch.compile, dynamic=False, fullgraph=True) if compiled else lambda f: f
        for f in (pool, force, pages_of, hide, positions_of):
            setattr(self, f.__name__, wrap(functools.partial(f, torch)))


def pool(torch: Any, k: Any, scales: Any, B: int) -> tuple[Any, Any]:
    """[S, D] e4m3, [S] -> the means of blocks [n, D] e4m3, [n]."""
    means = (k.float() * scales[:, None]).view(-1, B, k.shape[1]).mean(dim=1)
    scale = (means.abs().amax(dim=1) / _E4M3_MAX).clamp_min(1e-10)
    return (means / scale[:, None]).to(k.dtype), scale


def force(torch: Any, scores: Any, n_visible: Any) -> Any:
    """Scores [M, n]: the first and the last visible block are always kept, those after them never."""
    block = torch.arange(scores.shape[1], device=scores.device)[None, :]
    ends = (block == 0) | (block == n_visible[:, None] - 1)
    return torch.where(ends, float("inf"), torch.where(block < n_visible[:, None], scores, float("-inf")))


def pages_of(torch: Any, blocks: Any, table: Any, B: int) -> Any:
    """[M, m] blocks -> [M, m * B / 64] pages, by the tables [M or 1, P] of the queries' sequences."""
    per_block = B // PAGE
    wanted = (blocks.clamp_min(0)[:, :, None] * per_block + torch.arange(per_block, device=blocks.device)).flatten(1)
    return torch.gather(table.expand(blocks.shape[0], -1), 1, wanted.long()).to(torch.int32)


def hide(torch: Any, scores: Any, blocks: Any, e: Any, B: int) -> Any:
    """Scores [M, m * B] of the tokens of blocks: -inf where the query does not see the token."""
    token = (blocks[:, :, None] * B + torch.arange(B, device=blocks.device)).flatten(1)
    return torch.where((token >= 0) & (token < e[:, None]), scores, float("-inf"))


def positions_of(torch: Any, columns: Any, blocks: Any, e: Any, B: int) -> Any:
    """Columns [M, k] of scores of blocks' tokens -> positions [M, k] int32, -1 where there is none."""
    safe = columns.clamp_min(0).long()
    position = torch.gather(blocks, 1, safe // B) * B + safe % B
    is_real = (columns >= 0) & (position >= 0) & (position < e[:, None])
    return torch.where(is_real, position, -1).to(torch.int32)


def index_pages(torch: Any, k: Any, scales: Any) -> Any:
    """[pages, 64, D] e4m3, [pages, 64] float32 -> [pages, 64, 1, D + 4] uint8 of DeepGEMM: all keys, then scales."""
    n, size, D = k.shape
    flat = torch.cat(
        [k.view(torch.uint8).reshape(n, size * D), scales.contiguous().view(torch.uint8).view(n, -1)], dim=1
    )
    return flat.view(n, size, 1, D + 4)
