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


def select_on(axes: Axes, arrays: tuple[Array, ...], method: Lighthouse, options: Options) -> LighthouseSelection:
    """The selection by queries and keys, and the dilated scorer's by values, that are split over the mesh."""

    def one_device(*arrays: Array) -> LighthouseSelection:
        a, b = _strengths(axes, arrays, method, options)
        own = picks(a, b, method.n_tiles // axes.n_devices, method)
        # A few numbers a tile; where they put the windows every device works out for all.
        every = jax.tree.map(lambda x: lax.all_gather(x, axes.context, axis=2, tiled=True), own)
        B, T, G = a.shape
        return placed(every, (B, T * axes.n_devices, G), method)

    split, rows = PartitionSpec(axes.data, axes.context), PartitionSpec(axes.data)
    return meshes.on_devices(one_device, axes.mesh, (split,) * len(arrays), rows)(*arrays)


def _strengths(
    axes: Axes, arrays: tuple[Array, ...], method: Lighthouse, options: Options
) -> tuple[Array, Array]:  # fmt: skip
    """Scores of this device's tokens, two [B, T, G]; the dilated scorer's attention is over all tokens, by heads."""
    if method.scorer == "norm":
        return strengths(*arrays, method=method, options=options)
    shares = _Shares.of(axes, arrays[1].shape[2])
    found = strengths(*map(shares.by_heads, arrays), method=method, options=options)
    a, b = jnp.split(shares.by_tokens(jnp.stack(found, axis=-1)), 2, axis=-1)
    return a[..., 0], b[..., 0]


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
    (_, T, H, _), G, S, n = q.shape, k.shape[2], entries.shape[1], axes.n_devices
    shares = _Shares.of(axes, G)
    pyramid = method.pyramid(T)
    pieces = _Pieces.of(entries, method, n)
    own = lax.axis_index(shares.axis)
    start = pieces.start(own)
    here = _local(_row_range(entries, start, pieces.size, pieces.length(own)), method.pyramid(T * n), pyramid, own)
    placed = jnp.concatenate(slots, axis=1)
    placed = jnp.where(placed >= 0, placed - start, -1)

    to_all, to_own = pieces.maps(shares.own(pieces.added, own), S)

    def exchanged(x: Array) -> Array:
        """[B, own places, heads of G groups, E] -> [B, S, heads of this device's groups, E]."""
        x = shares.by_heads(x)
        B, places, heads, E = x.shape
        x = gather(x.reshape(B, places, shares.size, -1), to_all, to_own, Pyramid(places, 1, 1))
        return x.reshape(B, S, heads, E)

    q, k, v = operands(q, k, v, here, placed, positions, pyramid, options.rotate)
    out = attention(exchanged(q), exchanged(k), exchanged(v), options)
    B, V = out.shape[0], out.shape[-1]
    out = shares.by_tokens(gather(out.reshape(B, S, shares.size, -1), to_own, to_all, Pyramid(S, 1, 1)))
    return results(out.reshape(B, pieces.size, H, V), here, placed, pyramid, shares.axis)


class _Shares(NamedTuple):
    """How groups of heads are distributed over the `n` devices of an axis: `size` each, at the end some get none."""

    axis: str
    n: int
    groups: int

    @classmethod
    def of(cls, axes: Axes, groups: int) -> "_Shares":
        assert axes.context is not None  # the caller has checked
        return cls(axes.context, axes.n_devices, groups)

    @property
    def size(self) -> int:
        return -(-self.groups // self.n)

    def by_heads(self, x: Array) -> Array:
        """[B, own places, heads of all groups, E] -> [B, places of all devices, heads of this device's groups, E]."""
        B, _, heads, E = x.shape
        each = heads // self.groups
        x = self._padded(x.reshape(B, -1, self.groups, each * E), 2)
        x = lax.all_to_all(x, self.axis, split_axis=2, concat_axis=1, tiled=True)
        return x.reshape(B, -1, self.size * each, E)

    def by_tokens(self, x: Array) -> Array:
        """[B, places of all devices, groups of this one, E] -> [B, own places, all groups, E]."""
        return lax.all_to_all(x, self.axis, split_axis=1, concat_axis=2, tiled=True)[:, :, : self.groups]

    def own(self, x: Array, device: Array) -> Array:
        """[B, G] -> [B, size] of a device."""
        return lax.dynamic_slice_in_dim(self._padded(x, 1), device * self.size, self.size, axis=1)

    def _padded(self, x: Array, axis: int) -> Array:
        more = [(0, 0)] * x.ndim
        more[axis] = (0, self.size * self.n - self.groups)
        return jnp.pad(x, more)


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
