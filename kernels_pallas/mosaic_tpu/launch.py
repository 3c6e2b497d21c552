"""How kernels are launched: their buffers by name, and the tile of queries that a grid step is at."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import fetch, topk_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES, SUBLANES
from hisa_jax.kernels_pallas.mosaic_tpu.fetch import CopyGroup
from hisa_jax.kernels_pallas.mosaic_tpu.query_tiles import BatchTiles, Tiles
from hisa_jax.kernels_pallas.mosaic_tpu.topk_body import SLOTS
from hisa_jax.kernels_pallas.types import Interpret, Ref

_MARGIN_BYTES = 6 << 20  # what the compiler keeps in VMEM for itself, spills and semaphores among it
HBM = pl.BlockSpec(memory_space=pltpu.HBM)  # of operands that the kernel copies itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """A kernel, ready to be called.

    Attributes:
        body: takes one `refs`, the record of all buffers.
        refs: makes that record of the buffers by name.
        grid: (cores, sequences, tiles of a sequence), unless `dimension_semantics` says otherwise. At the first tile of
            a sequence its keys are brought to VMEM for all of them.
        scalars: prefetched to SMEM; the index maps of all specs see them.
        operands: array and spec of each; without an array there is no such buffer.
        outs: shape and spec of each.
        scratch: shapes; vmem_bytes: what the kernel needs in VMEM.
        pinned: operands that stay in HBM although the grid brings their blocks.
    """

    body: Callable[..., None]
    refs: Callable[..., Any]
    name: str
    grid: tuple[int, ...]
    scalars: dict[str, Array]
    operands: dict[str, tuple[Array | None, pl.BlockSpec]]
    outs: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]]
    scratch: dict[str, Ref]
    vmem_bytes: int
    interpret: Interpret
    dimension_semantics: Any = ("parallel", "arbitrary", "arbitrary")
    pinned: tuple[str, ...] = ()

    def __call__(self) -> list[Array]:
        operands = {name: (x, spec) for name, (x, spec) in self.operands.items() if x is not None}
        names = (*self.scalars, *operands, *self.outs, *self.scratch)

        def in_hbm(name: str) -> Array:
            # Else XLA brings what fits to VMEM whole before the kernel starts, the keys of a small batch.
            x, spec = operands[name]
            is_pinned = (spec.memory_space == pltpu.HBM or name in self.pinned) and not self.interpret
            return pltpu.with_memory_space_constraint(x, pltpu.HBM) if is_pinned else x

        return pl.pallas_call(
            lambda *refs: self.body(self.refs(**dict(zip(names, refs, strict=True)))),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(self.scalars),
                grid=self.grid,
                in_specs=[spec for _, spec in operands.values()],
                out_specs=[spec for _, spec in self.outs.values()],
                scratch_shapes=list(self.scratch.values()),
            ),
            out_shape=[shape for shape, _ in self.outs.values()],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=self.dimension_semantics,
                vmem_limit_bytes=self.vmem_bytes + _MARGIN_BYTES,
                # Checks of the copies take longer than the copies: 27 cycles each instead of 10. Every index is clipped
                # before the launch instead.
                disable_bounds_checks=True,
            ),
            interpret=self.interpret,
            name=self.name,
        )(*self.scalars.values(), *map(in_hbm, operands))


@dataclasses.dataclass(frozen=True)
class Tile:
    """In a kernel: the tile of queries that it is at.

    Attributes:
        sequence: that they are of; is_first: whether the tile before was of another one.
        copy_group: brings blocks of the sequence.
    """

    sequence: Array
    is_first: Array
    copy_group: CopyGroup


def by_sequence(launch: Launch, tiles: Tiles) -> Launch:
    """A launch whose body takes (tile, refs), as one whose body takes refs alone: `Tile` is what a grid step is at."""
    if isinstance(tiles, BatchTiles):

        def of_batch(refs: Any) -> None:
            b = pl.program_id(1)
            first_block = pl.multiple_of(b * tiles.n_blocks, GROUP)
            launch.body(Tile(b, pl.program_id(2) == 0, fetch.in_a_row(first_block, GROUP)), refs)

        # A whole prefill of queries fits VMEM, but nothing hides its copy.
        return dataclasses.replace(launch, body=of_batch, pinned=("q",))
    per_core = launch.grid[2]

    def split(*, _first: Ref, _sequence: Ref, _where: Ref, _table: Ref = None, **own: Ref) -> tuple:
        return _sequence, _where, _table, launch.refs(**own)

    def of_ragged(buffers: tuple) -> None:
        sequence_smem, where_smem, table_smem, refs = buffers
        t = pl.program_id(2)
        n = pl.program_id(0) * per_core + t
        sequence = sequence_smem[n]

        @pl.when(sequence >= 0)
        def _tile():
            is_first = (t == 0) | (sequence != sequence_smem[jnp.maximum(n - 1, 0)])
            where = where_smem[sequence]
            in_a_row = table_smem is None
            copy_group = fetch.in_a_row(where) if in_a_row else fetch.by_pages(table_smem, where, tiles.per_block)
            launch.body(Tile(sequence, is_first, copy_group), refs)

    def table_of(core: Ref, _: Ref, t: Ref, first_smem: Ref, sequence_smem: Ref, *__: Ref) -> tuple:
        return jnp.maximum(sequence_smem[core * per_core + t], 0), 0, 0

    where, operands = tiles.first_blocks if tiles.table is None else tiles.n_pages, launch.operands
    assert where is not None
    if tiles.table is not None:
        of_tile = pl.BlockSpec((None, 1, tiles.table.shape[1]), table_of, memory_space=pltpu.SMEM)
        operands = {"_table": (tiles.table[:, None], of_tile), **operands}
    scalars = {"_first": tiles.first, "_sequence": tiles.sequence, "_where": where, **launch.scalars}
    return dataclasses.replace(launch, body=of_ragged, refs=split, scalars=scalars, operands=operands)


def queries(tiles: Tiles, q: Array, tile_t: int, per_core: int) -> tuple[Array, pl.BlockSpec]:
    """[T, *trailing] -> what a kernel takes in its place, and the spec of [tile_t, *trailing] of it.

    Of ragged sequences q stays where it is, and tiles begin at any row of it.
    """
    trailing = q.shape[1:]
    if isinstance(tiles, BatchTiles):
        return tiles.gather(q), rows(tile_t, per_core, *trailing)

    def index(core: Ref, _: Ref, t: Ref, first_smem: Ref, *__: Ref) -> tuple:
        return first_smem[core * per_core + t], *(0 for _ in trailing)

    return q, pl.BlockSpec((pl.Element(tile_t), *(pl.Element(n) for n in trailing)), index)


def rows(tile: int | None, per_core: int, *trailing: int, memory_space: Ref = None) -> pl.BlockSpec:
    """Block [tile, *trailing] of [B, T, *trailing] on a grid of (cores, B, `per_core` tiles of a sequence).

    Args:
        tile: None for a tile a row, whose block is [*trailing].
    """

    def index(core: Ref, b: Ref, t: Ref, *_: Ref) -> tuple:
        return b, core * per_core + t, *(0 for _ in trailing)

    return pl.BlockSpec((None, tile, *trailing), index, memory_space=memory_space)


def out(spec: pl.BlockSpec, *shape: int) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
    """An output of int32."""
    return jax.ShapeDtypeStruct(shape, jnp.int32), spec


def selection_scratch(tiles: int, groups: int, k: int) -> dict[str, Ref]:
    """What `topk_body.select` needs, for `tiles` of eight rows."""
    return {
        "sort_keys_vmem": pltpu.VMEM((tiles, groups * SUBLANES, LANES), jnp.int32),
        "thresholds_vmem": pltpu.VMEM((tiles, SUBLANES, LANES), jnp.int32),
        "table_vmem": pltpu.VMEM(topk_body.table_shape(groups), jnp.int32),
        "chosen_vmem": pltpu.VMEM((tiles, -(-k // SLOTS) * SUBLANES * SUBLANES, LANES), jnp.int32),
    }


def pad_axis(x: Array, axis: int, multiple: int) -> Array:
    """Zeros after an axis, to a multiple."""
    return jnp.pad(x, [(0, -n % multiple if i == axis else 0) for i, n in enumerate(x.shape)])
