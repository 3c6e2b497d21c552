"""What the launches of the kernels have in common."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import fetch, topk_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES, ROWS
from hisa_jax.kernels_pallas.mosaic_tpu.fetch import CopyGroup
from hisa_jax.kernels_pallas.mosaic_tpu.ragged import RaggedTiles
from hisa_jax.kernels_pallas.mosaic_tpu.topk_body import SLOTS
from hisa_jax.kernels_pallas.types import Interpret, Ref

_MARGIN_BYTES = 6 << 20  # what the compiler keeps in VMEM for itself, spills and semaphores among it


def call(
    body: Callable,
    *,
    name: str,
    grid: tuple[int, ...],
    prefetch: list,
    operands: list,
    in_specs: list[pl.BlockSpec],
    out_specs: Any,
    out_shape: Any,
    scratch: dict[str, Ref],
    vmem_bytes: int,
    interpret: Interpret,
    dimension_semantics: Any = ("parallel", "arbitrary", "arbitrary"),
) -> Any:
    """A `pl.pallas_call` whose body gets its scratch by keyword.

    Args:
        grid: (cores, sequences, tiles of a sequence), unless `dimension_semantics` says otherwise. At the first tile of
            a sequence its keys are brought to VMEM for all of them.
    """

    if not interpret:
        # Else XLA brings what fits, the keys of a small batch, to VMEM whole before the kernel copies a part of it.
        operands = [
            pltpu.with_memory_space_constraint(x, pltpu.HBM) if spec.memory_space == pltpu.HBM else x
            for x, spec in zip(operands, in_specs, strict=True)
        ]

    def named(*refs: Ref) -> None:
        n = len(refs) - len(scratch)
        body(*refs[:n], **dict(zip(scratch, refs[n:], strict=True)))

    return pl.pallas_call(
        named,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=dimension_semantics,
            vmem_limit_bytes=vmem_bytes + _MARGIN_BYTES,
            # Checks of the copies take longer than the copies: 27 cycles each instead of 10. Every index is clipped
            # before the launch instead.
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name=name,
    )(*prefetch, *operands)


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


def call_by_sequence(
    body: Callable, tiles: RaggedTiles | None, *, prefetch: list, operands: list, in_specs: list, **rest: Any
) -> Any:
    """A `call` whose body gets its `Tile` first; of ragged sequences, or of a batch if `tiles` is None."""
    if tiles is None:

        def of_batch(*refs: Ref, **scratch: Ref) -> None:
            b = pl.program_id(1)
            body(Tile(b, pl.program_id(2) == 0, fetch.in_a_row(b)), *refs, **scratch)

        return call(of_batch, prefetch=prefetch, operands=operands, in_specs=in_specs, **rest)

    per_core, n_prefetch = rest["grid"][2], len(prefetch)

    def of_ragged(_first_smem: Ref, sequence_smem: Ref, keys_smem: Ref, *refs: Ref, **scratch: Ref) -> None:
        t = pl.program_id(2)
        n = pl.program_id(0) * per_core + t
        sequence = sequence_smem[n]

        @pl.when(sequence >= 0)
        def _tile():
            is_first = (t == 0) | (sequence != sequence_smem[jnp.maximum(n - 1, 0)])
            if tiles.table is None:
                body(Tile(sequence, is_first, fetch.in_a_row(0, keys_smem[sequence])), *refs, **scratch)
            else:
                table_smem, others = refs[n_prefetch], refs[:n_prefetch] + refs[n_prefetch + 1 :]
                copy_group = fetch.by_pages(table_smem, keys_smem[sequence], tiles.per_block)
                body(Tile(sequence, is_first, copy_group), *others, **scratch)

    own, specs = [], []
    if tiles.table is not None:
        own = [tiles.table[:, None]]

        def table_of(core: Ref, _: Ref, t: Ref, first_smem: Ref, sequence_smem: Ref, *__: Ref) -> tuple:
            return jnp.maximum(sequence_smem[core * per_core + t], 0), 0, 0

        specs = [pl.BlockSpec((None, 1, tiles.table.shape[1]), table_of, memory_space=pltpu.SMEM)]
    return call(
        of_ragged,
        prefetch=[tiles.first, tiles.sequence, tiles.keys, *prefetch],
        operands=[*own, *operands],
        in_specs=[*specs, *in_specs],
        **rest,
    )


def queries(tiles: RaggedTiles | None, tile_t: int, per_core: int, *trailing: int) -> pl.BlockSpec:
    """[tile_t, *trailing] of a batch's [B, T, *trailing], or of ragged sequences' [T, *trailing]."""
    if tiles is None:
        return rows(tile_t, per_core, *trailing)

    def index(core: Ref, _: Ref, t: Ref, first_smem: Ref, *__: Ref) -> tuple:
        return first_smem[core * per_core + t], *(0 for _ in trailing)

    return pl.BlockSpec((pl.Element(tile_t), *(pl.Element(n) for n in trailing)), index)


def in_hbm(operands: list) -> list[pl.BlockSpec]:
    """For operands that the kernel copies itself."""
    return [pl.BlockSpec(memory_space=pltpu.HBM)] * len(operands)


def rows(tile: int, tiles: int, *trailing: int, memory_space: Ref = None) -> pl.BlockSpec:
    """Block [tile, *trailing] of [B, T, *trailing] on a grid of (cores, B, `tiles` of a sequence on one core)."""

    def index(core: Ref, b: Ref, t: Ref, *_: Ref) -> tuple:
        return b, core * tiles + t, *(0 for _ in trailing)

    return pl.BlockSpec((None, tile, *trailing), index, memory_space=memory_space)


def selection_scratch(tiles: int, groups: int, k: int) -> dict[str, Ref]:
    """What `topk_body.select` needs, for `tiles` of eight rows."""
    return {
        "sort_keys_vmem": pltpu.VMEM((tiles, groups * ROWS, LANES), jnp.int32),
        "thresholds_vmem": pltpu.VMEM((tiles, ROWS, LANES), jnp.int32),
        "table_vmem": pltpu.VMEM(topk_body.table_shape(groups), jnp.int32),
        "chosen_vmem": pltpu.VMEM((tiles, -(-k // SLOTS) * ROWS * ROWS, LANES), jnp.int32),
    }


def pad_axis(x: Array, axis: int, multiple: int) -> Array:
    """Zeros behind an axis, to a multiple."""
    return jnp.pad(x, [(0, -n % multiple if i == axis else 0) for i, n in enumerate(x.shape)])
