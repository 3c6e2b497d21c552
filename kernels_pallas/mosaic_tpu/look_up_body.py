"""Device code that turns chosen columns into what stands there: sort keys, positions."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES, SUBLANES
from hisa_jax.kernels_pallas.types import Ref

_GROUPS = 4  # that a turn offers; there are a multiple of them
_AT_A_TIME = 16  # registers of slots: with their columns they fill three quarters of the registers there are


def look_up(
    entries_of: Callable[[Array], Array],
    groups: Array | int,
    columns_ref: Ref,
    slots: int,
    store: Callable[[int, Array], None],
    shift: int = 0,
) -> None:
    """Calls store(i, what stands in the columns of slots 128 i and on, [8, 128] int32): -1 for no column.

    A TPU gathers along lanes, 128 values at a time: every group of values is offered to all slots.

    Args:
        entries_of: group of 128 columns -> [8, 128] int32, what stands in them; groups: how many may be chosen.
        columns_ref: [K // 16, 128] chosen columns of a tile; slots: how many of the K are looked up.
        shift: 2^shift columns side by side share an entry.
    """
    n = -(-slots // LANES)
    for first in range(0, n, _AT_A_TIME):
        some = range(first, min(first + _AT_A_TIME, n))
        columns = [columns_ref[pl.ds(i * SUBLANES, SUBLANES)] >> shift for i in some]

        def some_groups(g: Array, found: tuple[Array, ...], columns: list[Array] = columns) -> tuple[Array, ...]:
            group = [g * _GROUPS + each for each in range(_GROUPS)]
            entries = [entries_of(one) for one in group]

            def offer(column: Array, x: Array) -> Array:
                # One column after the other: its lanes are set up once for all groups.
                for one, values in zip(group, entries, strict=True):
                    entry = jnp.take_along_axis(values, column & (LANES - 1), axis=1, mode="promise_in_bounds")
                    # Of -1, which is no column, the group is -1.
                    x = jnp.where(column >> 7 == one, entry, x)
                return x

            return tuple(offer(column, x) for column, x in zip(columns, found, strict=True))

        nothing = tuple(jnp.full((SUBLANES, LANES), -1, jnp.int32) for _ in some)
        for i, x in zip(some, lax.fori_loop(0, pl.cdiv(groups, _GROUPS), some_groups, nothing), strict=True):
            store(i, x)


def in_tile(values_ref: Ref) -> Callable[[Array], Array]:
    """`entries_of` values [G * 8, 128] that lie as the sort keys of a tile."""
    return lambda g: values_ref[pl.ds(pl.multiple_of(g * SUBLANES, SUBLANES), SUBLANES)]


def write_sort_keys(sort_keys_vmem: Ref, chosen_vmem: Ref, o_ref: Ref, groups: Array | int | None = None) -> None:
    """Sort keys [tiles, G * 8, 128] of the chosen columns of each tile, in rows: [tiles, 8, slots].

    Args:
        groups: how many of the G may be chosen, the first; all if None.
    """
    n_groups = sort_keys_vmem.shape[1] // SUBLANES if groups is None else groups

    def one_tile(tile: Array, _: None) -> None:
        def store(i: int, sort_keys: Array) -> None:
            o_ref[tile, :, i * LANES : (i + 1) * LANES] = sort_keys

        look_up(in_tile(sort_keys_vmem.at[tile]), n_groups, chosen_vmem.at[tile], o_ref.shape[2], store)

    lax.fori_loop(0, o_ref.shape[0], one_tile, None)
