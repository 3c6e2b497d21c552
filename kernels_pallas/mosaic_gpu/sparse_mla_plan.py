"""What a launch of `sparse_mla` is made of: static numbers, arrays in device memory, shared memory."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
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
LOAD_REGISTERS = 56
HELD = (0, 256, 512)  # first columns of blocks of 64 of the queries that may stay in registers
# Rows of `Smem.rows`, and in the last one by words: barriers made in PTX, and whose turn it is.
BIAS, DECAY, TOTAL, WORDS, ROWS = 0, SLOTS, 2 * SLOTS, 3 * SLOTS, 3 * SLOTS + 1
_TURN = WORDS * HEADS + SLOTS * len(PARTS) * BARRIER_WORDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """What is tried side by side: it changes the speed, nothing else."""

    held: int = 2  # blocks of 64 columns of the queries in registers, 0 to 3
    holds_p: bool = False  # the warp-groups of values take probabilities to registers
    turns: str = "first"  # scores go first if this part of their next tile has landed: "first", "second", or "none"
    naps: bool = True  # who waits for its turn sleeps between looks
    l2_bytes: int = 0  # of 256 around each copied piece, brought to L2
    is_apart: bool = False  # each warp that copies has half of the rows of one part, not a quarter of those of both

    @property
    def registers(self) -> tuple[int, int, int]:
        """A thread of values, of scores, of copies: twice the first and the others are 512."""
        if self.holds_p:
            return 176, 104, 56
        return (168, 128, 48) if self.held > 2 else (168, 120, LOAD_REGISTERS)


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
    form: Form
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

    def turn(self) -> Row:
        """Not 0: the warp-group that scores asks for the tensor core."""
        return Row(self.rows, jnp.int32(_TURN), 1)
