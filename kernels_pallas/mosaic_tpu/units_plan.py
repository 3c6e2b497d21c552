"""The static numbers and the buffers of `units`, for several heads and for a head by itself."""

import dataclasses
from typing import NamedTuple

from hisa_jax.kernels_pallas.mosaic_tpu.config import Choice
from hisa_jax.kernels_pallas.types import Ref


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch.

    Attributes:
        tiles: of queries, of a core and sequence.
        part: queries whose blocks are chosen side by side.
        block_size: tokens.
        span: groups of 128 blocks that the selection looks at in one go.
        has_one_head, has_relu: how a key is scored.
    """

    tiles: int
    part: int
    block_size: int
    span: int
    has_one_head: bool
    has_relu: bool
    choice: Choice

    @property
    def is_masked(self) -> bool:
        """Whether it matters which tokens of its last block a query sees."""
        return self.choice.keep_last == 0


class Refs(NamedTuple):
    """The buffers."""

    seen_smem: Ref  # [tiles of the grid * parts], the most keys of blocks that a query of the part may keep
    # Windows of the grid, of one tile of queries; of a head by itself queries lie along lanes, padded to a multiple.
    eligible: Ref  # [tile_t // 8, 8, 1], blocks that each query may keep
    q: Ref  # [tile_t, H, D]; of one head [lanes, D]
    chosen: Ref  # out: [tile_t // 8, 8, slots], block ids, ascending, then -1
    k: Ref  # [N, page_size, D] in HBM
    # Scratch.
    keys_vmem: Ref  # [2, GROUP, unit, D], the ring
    sems: Ref  # [2, 2], of the ring, by slot and operand
    sort_keys_vmem: Ref  # [tile_t // 8 or more, groups * 8, LANES]; this and the next three as in `topk_body.select`
    thresholds_vmem: Ref
    table_vmem: Ref
    chosen_vmem: Ref
    w: Ref = None  # [tile_t, H]; of one head [1, lanes], where it is weighted
    visible: Ref = None  # [tile_t, 1]; of one head [1, lanes]; where the last block is not always kept
    sort_keys: Ref = None  # out, maybe: [tile_t // 8, 8, slots], of the chosen
    scale: Ref = None  # [N, page_size] in HBM
    scale_vmem: Ref = None  # [2, GROUP * per_block, page_size], the ring
    # Of several heads, as in `flat_body.Refs`.
    w_vmem: Ref = None
    partial_vmem: Ref = None
    scores_vmem: Ref = None  # [tile_t // 8, keys of a step // 16, LANES] float32, eight rows for 128 keys
    # Of one.
    best_vmem: Ref = None  # [lanes // LANES, 8 * blocks, LANES] float32, of 128 blocks or of a step's, if more
    columns_vmem: Ref = None  # [keys of a step, LANES] float32, the scale of each key
