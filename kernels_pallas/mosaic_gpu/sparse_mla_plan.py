"""What a launch of `sparse_mla` is made of: static numbers, arrays in device memory, shared memory."""

import dataclasses
from typing import NamedTuple

from jax import Array

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.gather_rows import BARRIER_WORDS
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import Row
from hisa_jax.kernels_pallas.types import Ref
from hisa_jax.latents import QuantizedLatents

HEADS = 64  # of one query a CTA takes: the rows of a product
SLOTS, TOKENS = 2, 64  # of a tile
PAIR = SLOTS * TOKENS  # what a list is a multiple of: every query starts at the first slot
KEY_DIM, VALUE_DIM = 576, 512
# Columns that come and go together: what each warp-group of values multiplies first, and the rest of the values. The
# features after them come with one of both, and go as soon as there are scores.
PARTS = (((0, 128), (256, 128)), ((128, 128), (384, 128)))
ROPE = (VALUE_DIM, KEY_DIM - VALUE_DIM)
HELD = (0, 256)  # first columns of the blocks of 64 of the queries that stay in registers
# Registers a thread: twice those of values and the others are 512, all that there are.
VALUE_REGISTERS, SCORE_REGISTERS, LOAD_REGISTERS = 168, 120, 56
# Rows of `Smem.rows`; the last one has the barriers made in PTX.
BIAS, DECAY, TOTAL, WORDS, ROWS = 0, SLOTS, 2 * SLOTS, 3 * SLOTS, 3 * SLOTS + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    T: int  # queries of all sequences
    queries: int  # of a sequence
    keys: int  # of a sequence
    groups: int  # of 64 heads
    n_splits: int
    pairs: int  # of tiles a split
    scale: float
    n_ctas: int
    interpret: object

    @property
    def n_items(self) -> int:
        return self.n_splits * self.T * self.groups

    def items(self, cta: Array) -> Array:
        """How many items this CTA has: cta, cta + n_ctas, ..."""
        return (self.n_items - cta + self.n_ctas - 1) // self.n_ctas

    def item(self, cta: Array, i: Array) -> tuple[Array, Array, Array]:
        """Split, query and first head. Groups of a query are neighbours: L2 serves all but one."""
        item = cta + i * self.n_ctas
        part = item // self.groups
        return part // self.T, part % self.T, item % self.groups * HEADS


class Inputs(NamedTuple):
    """Arrays in device memory, whole."""

    n_pairs: Ref | None  # [n_splits * T] int32, of tiles of each part of a list; None: all roles count for themselves
    indices: Ref  # [T, K] int32
    q: Ref  # [T, groups * 64, E]
    kv: Ref | QuantizedLatents  # [B * S, E], or refs of its parts


class Smem(NamedTuple):
    """Shared memory of a CTA: the heads of one query, two tiles with what belongs to each, probabilities of one.

    Pallas begins each array at a multiple of 1024 bytes, so that small ones share `rows`.
    """

    k_free: Ref  # barriers [2 * parts of columns], of both warp-groups that add values
    k_full: Ref  # barriers [2], in interpret mode alone
    k: Ref  # [2, 64, E]
    p_free: Ref  # barrier, of both warp-groups that add values
    p_full: Ref  # barriers [2], of the warp-group that scores
    p: Ref  # [64, 64]
    q_free: Ref  # barrier, of the warp-group that scores
    q_full: Ref  # barrier, of the copy
    q: Ref  # [1, 64, E]
    ready: Ref  # barrier: those made in PTX are there
    rope_free: Ref  # barriers [2], of the warp-group that scores
    rows: Ref  # [7, 64] float32

    def bias(self, slot: Array) -> Row:
        """0 or -inf a token."""
        return Row(self.rows, BIAS + slot, TOKENS)

    def decay(self, slot: Array) -> Row:
        """A head: what the sums so far are multiplied by."""
        return Row(self.rows, DECAY + slot, HEADS)

    def total(self, slot: Array) -> Row:
        """A head: the sum of probabilities so far."""
        return Row(self.rows, TOTAL + slot, HEADS)

    def landed(self, barrier: Array) -> Row:
        """[2 * parts] of the lanes that copy."""
        return Row(self.rows, WORDS * HEADS // BARRIER_WORDS + barrier, BARRIER_WORDS)
