"""Lighthouse on a mesh: each device has a run of whole tiles of every sequence.

    tokens of device r -> its entries --all_to_all--> all entries of its heads -> dense attention
                                                                                       |
    tokens of device r <- its outputs <--all_to_all-- outputs of all entries  <--------+
      ^ and the outputs of the last window of each level, of the device before

Tiles are picked apart from each other, so the selection is that of one device; so are the heads' attention, and a
window's sums, which are made in one order everywhere. A device holds as many places for entries as its tiles can have
(with prefix="keep" the first device has up to widest - 1 more than the others), so what arrives is moved together.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from hisa_jax.lighthouse.forward import Options, attention, operands, results, strengths
from hisa_jax.lighthouse.method import Lighthouse, Pyramid
from hisa_jax.lighthouse.selection import LighthouseSelection, picks, placed
from hisa_jax.lighthouse.windows import by_level, gather
from hisa_jax.sharded import meshes
from hisa_jax.sharded.meshes import Axes


def select_on(axes: Axes, q: Array, k: Array, method: Lighthouse, options: Options) -> LighthouseSelection:
    """The selection by queries and keys that are split over the mesh."""

    def one_device(q: Array, k: Array) -> LighthouseSelection:
        a, b = strengths(q, k, method=method, options=options)
        own = picks(a, b, method.n_tiles // axes.n_devices, method)
        # A few numbers a tile; where they put the windows every device works out for all.
        every = jax.tree.map(lambda x: lax.all_gather(x, axes.context, axis=2, tiled=True), own)
        B, T, G = a.shape
        return placed(every, (B, T * axes.n_devices, G), method)

    split, rows = PartitionSpec(axes.data, axes.context), PartitionSpec(axes.data)
    return meshes.on_devices(one_device, axes.mesh, (split, split), rows)(q, k)


def attend_on(axes: Axes) -> Callable[..., Array]:
    """`forward.attend` on the mesh; differentiable."""

    def attend(
        q: Array, k: Array, v: Array, selection: LighthouseSelection, positions: Array, method: Lighthouse,
        options: Options,
    ) -> Array:  # fmt: skip
        slots = by_level(selection.slots, method.pyramid(q.shape[1]))

        def one_device(q: Array, k: Array, v: Array, entries: Array, slots: list[Array], positions: Array) -> Array:
            return _one_device(axes, q, k, v, entries, slots, positions, method, options)

        rows, split = PartitionSpec(axes.data), PartitionSpec(axes.data, axes.context)
        specs = (split, split, split, rows, split, split)
        run = jax.shard_map(
            one_device, mesh=meshes.automatic(axes.mesh), in_specs=specs, out_specs=split, check_vma=False
        )
        return jax.jit(run)(q, k, v, selection.entries, slots, positions)

    return attend


def _one_device(
    axes: Axes, q: Array, k: Array, v: Array, entries: Array, slots: list[Array], positions: Array,
    method: Lighthouse, options: Options,
) -> Array:  # fmt: skip
    """Tokens of this device [B, T, ...], all entries [B, S, G], its windows' places by level -> [B, T, H, V]."""
    axis, n = axes.context, axes.n_devices
    assert axis is not None  # the caller has checked
    (_, T, H, _), G, S = q.shape, k.shape[2], entries.shape[1]
    pyramid = method.pyramid(T)
    pieces = _Pieces.of(entries, method, n)
    own = lax.axis_index(axis)
    start = pieces.start(own)
    here = _local(_row_range(entries, start, pieces.size, pieces.length(own)), method.pyramid(T * n), pyramid, own)
    placed = jnp.concatenate(slots, axis=1)
    placed = jnp.where(placed >= 0, placed - start, -1)

    # Groups of heads in equal shares; where devices are more than groups, some get none of them.
    share = -(-G // n)
    extra = share * n - G
    to_all, to_own = pieces.maps(_share(pieces.added, extra, own, share), S)

    def exchanged(x: Array) -> Array:
        """[B, own places, heads of G groups, E] -> [B, S, heads of this device's groups, E]."""
        B, _, heads, E = x.shape
        x = jnp.pad(x.reshape(B, -1, G, heads // G * E), ((0, 0), (0, 0), (0, extra), (0, 0)))
        x = lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)
        x = gather(x, to_all, to_own, Pyramid(pieces.size * n, 1, 1))
        return x.reshape(B, S, share * heads // G, E)

    q, k, v = operands(q, k, v, here, placed, positions, pyramid, options.rotate)
    out = attention(exchanged(q), exchanged(k), exchanged(v), options)
    B, V = out.shape[0], out.shape[-1]
    out = gather(out.reshape(B, S, share, -1), to_own, to_all, Pyramid(S, 1, 1))
    out = lax.all_to_all(out, axis, split_axis=1, concat_axis=2, tiled=True)[:, :, :G]
    return results(out.reshape(B, pieces.size, H, V), here, placed, pyramid, axis)


class _Pieces(NamedTuple):
    """How the entries of a sequence lie on devices: `regular` a device in a row, and on the first `added` [B, G] more.

    `size` is the places that each device has for them.
    """

    regular: int
    size: int
    added: Array

    @classmethod
    def of(cls, entries: Array, method: Lighthouse, n: int) -> "_Pieces":
        regular = (entries.shape[1] - method.n_kept) // n
        empty = jnp.sum(entries < 0, axis=1, dtype=jnp.int32)
        return cls(regular, regular + method.n_kept, method.n_kept - empty)

    def start(self, device: Array) -> Array:
        """[B, 1, G]: the place of a device's first entry among all."""
        return jnp.where(device > 0, device * self.regular + self.added, 0)[:, None]

    def length(self, device: Array) -> Array:
        """[B, 1, G]: how many entries a device has."""
        return jnp.where(device > 0, self.regular, self.regular + self.added)[:, None]

    def maps(self, added: Array, S: int) -> tuple[Array, Array]:
        """For groups with this `added` [B, g]: of each of S places the one among n * size, and the other way."""
        own = self._replace(added=added)
        n = (S - self.size + self.regular) // self.regular
        place = lax.broadcasted_iota(jnp.int32, (1, S, 1), 1)
        first = own.length(jnp.int32(0))
        device = jnp.where(place < first, 0, 1 + (place - first) // self.regular)
        inside = jnp.where(place < first, place, (place - first) % self.regular)
        to_all = jnp.where(device < n, device * self.size + inside, -1)
        parts = []
        for device_ in range(n):
            inside = lax.broadcasted_iota(jnp.int32, (1, self.size, 1), 1)
            at = jnp.int32(device_)
            parts.append(jnp.where(inside < own.length(at), own.start(at) + inside, -1))
        return to_all, jnp.concatenate(parts, axis=1)


def _row_range(x: Array, start: Array, size: int, length: Array) -> Array:
    """[B, S, G] int32 from `start` [B, 1, G] on -> [B, size, G], -1 from `length` on."""
    at = lax.broadcasted_iota(jnp.int32, (1, size, 1), 1)
    rows = jnp.take_along_axis(x, start + at, axis=1, mode="clip")
    return jnp.where(at < length, rows, -1)


def _local(entries: Array, whole: Pyramid, own: Pyramid, device: Array) -> Array:
    """Numbers of windows of the whole sequence -> of this device's tokens."""
    found = entries
    for start, own_start, size in zip(whole.starts, own.starts, own.sizes, strict=True):
        found = jnp.where(entries >= start, entries - start - device * size + own_start, found)
    return found


def _share(x: Array, extra: int, device: Array, size: int) -> Array:
    """[B, G], padded by 0 -> [B, size] of this device."""
    return lax.dynamic_slice_in_dim(jnp.pad(x, ((0, 0), (0, extra))), device * size, size, axis=1)
