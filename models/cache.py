"""What attention remembers of earlier tokens: one latent, one rope key and one index key a token and layer, in pages.

A token's place follows from its number in its sequence, whatever column of a padded batch it came in. So a selection,
which counts tokens from the start of the sequence, sees the same for a prompt alone, padded, or cut into chunks. Block
tables, one for all layers, map these places to pages: rows may share pages, and a server hands in tables of its own.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

import hisa_jax as hj
from hisa_jax.index_cache import check_page_size, is_block_size
from hisa_jax.methods import Sketch, is_by_best_token
from hisa_jax.models.checks import whole
from hisa_jax.models.config import Config
from hisa_jax.models.sharding import mesh_axis, per_device, size_of

_LARGEST_PAGE = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """The caches of all layers: a value that goes into a forward pass and comes out of it with more tokens.

    Attributes:
        layers: one `hj.IndexCache` a layer. Its latents are each token's latent after its norm, then its rotated rope
            key. Its keys are the index keys after norm and RoPE, quantised if the config says so; in layers that share
            another layer's selection they have 0 features.
        block_tables: [B, P] int32, the pages of each row in order. On a mesh that splits the batch they are numbers
            among the pages of the row's own group of devices.
        lengths: [B] int32, tokens in each row.
    """

    layers: tuple[hj.IndexCache, ...]
    block_tables: Array
    lengths: Array

    @property
    def capacity(self) -> int:
        """Tokens each row has room for. A row of more selects nothing."""
        return self.block_tables.shape[1] * self.layers[0].page_size


def page_size_of(methods: Iterable[hj.Method], wanted: int | None = None) -> int:
    """Tokens of a page that all blocks with means are made of; units of a scan and other blocks may cross pages.

    Args:
        methods: that read the pages.
        wanted: None: the largest up to 64.

    Raises: ValueError: `wanted` is no power of two, or a block is no whole pages of so many tokens.
    """
    blocks = _with_means(methods)
    if wanted is None:
        return math.gcd(_LARGEST_PAGE, *(method.block_size for method in blocks))
    wanted = whole("Model", "page_size", wanted)
    check_page_size("Model", wanted)
    for method in blocks:
        if method.block_size % wanted:
            raise ValueError(f"Model: page_size={wanted} with {method}, wanted a divisor of its block_size")
    return wanted


def _with_means(methods: Iterable[hj.Method]) -> list[hj.Hisa | hj.BlockSparse]:
    """Those that choose blocks by their means, which pages keep."""
    blocks = (method for method in methods if isinstance(method, hj.Hisa | hj.BlockSparse))
    return [method for method in blocks if not is_by_best_token(method)]


def stripe_of(methods: Iterable[hj.Method], page_size: int) -> int:
    """Tokens in a row that one device has where several share the pages of a row: whole blocks of all these methods."""
    blocks = (page_size if isinstance(method, hj.Dsa) else method.block_size for method in methods)
    return math.lcm(page_size, *blocks)


def pages_sharding(mesh: Mesh, batch: int) -> NamedSharding:
    """Where the pages of so many rows lie: those of a row on the devices of its group, an equal part on each."""
    axes = (mesh_axis(mesh, "batch", batch), "context" if size_of(mesh, "context") > 1 else None)
    return NamedSharding(mesh, PartitionSpec(tuple(axis for axis in axes if axis is not None) or None))


def row_after_row(x: jax.ShapeDtypeStruct, where: Sharding) -> Format:
    """The last axis of an array innermost in memory, also where the compiler would have it otherwise."""
    return Format(Layout(tuple(range(x.ndim))), where)


def sketch_of(methods: Iterable[hj.Method]) -> Sketch | None:
    """What these methods scan in place of the keys, None if all read the keys."""
    return next((method.sketch for method in methods if isinstance(method, hj.Scan) and method.sketch), None)


class Kept(NamedTuple):
    """What a layer keeps beside its index keys, where it has some: see `hj.init_cache`."""

    sketch: Sketch | None = None
    block_size: int | None = None


def kept_for(methods: Iterable[hj.Method]) -> Kept:
    """What a layer keeps for these methods: means of blocks on GPUs alone, whose kernels read them."""
    methods = list(methods)
    sizes = {method.block_size for method in _with_means(methods)}
    can_keep = jax.default_backend() == "gpu" and len(sizes) == 1 and all(map(is_block_size, sizes))
    return Kept(sketch_of(methods), sizes.pop() if can_keep else None)


def empty_pages(
    config: Config, n_pages: int, page_size: int, dtype: DTypeLike, kept: Sequence[Kept] | None = None
) -> tuple[hj.IndexCache, ...]:
    """Pages of every layer.

    Args:
        config: sizes, and the dtype of the index keys.
        n_pages, page_size: pages of a layer, and tokens of a page.
        dtype: of latents and index keys that are not quantised, and of rope keys beside latents that are not.
        kept: what each layer keeps beside its index keys; None: nothing.
    """

    def pages(kind: str, kept: Kept) -> hj.IndexCache:
        D, key_dtype = (config.index_head_dim, config.index_key_dtype or dtype) if kind == "full" else (0, dtype)
        return hj.init_cache(
            n_pages, page_size, D, key_dtype, **(kept if kind == "full" else Kept())._asdict(),
            latent_dim=config.kv_lora_rank + config.qk_rope_head_dim, latent_dtype=config.latent_dtype or dtype,
            latent_value_dim=config.kv_lora_rank,
        )  # fmt: skip

    kinds = config.indexer_kinds
    return tuple(pages(*layer) for layer in zip(kinds, kept or (Kept(),) * len(kinds), strict=True))


def empty_cache(
    config: Config, batch: int, capacity: int, dtype: DTypeLike, page_size: int, mesh: Mesh | None = None,
    kept: Sequence[Kept] | None = None, stripe: int | None = None,
) -> Cache:  # fmt: skip
    """A cache with pages of their own for at least `capacity` tokens in each of `batch` rows.

    Args:
        config, dtype, page_size, kept: see `empty_pages`.
        batch: B.
        capacity: tokens.
        mesh: what the batch and the pages of rows are split over, or None.
        stripe: tokens of a row one after the other that one device has; default: a page.

    Returns: `Cache` with lengths 0.
    """
    n_groups = 1 if mesh_axis(mesh, "batch", batch) is None else size_of(mesh, "data")
    n_devices, per_stripe = size_of(mesh, "context"), (stripe or page_size) // page_size
    P = -(-capacity // page_size)
    if n_devices > 1:  # as many pages of each row on each device
        P = -(-P // (n_devices * per_stripe)) * n_devices * per_stripe
    layers = empty_pages(config, batch * P, page_size, dtype, kept)
    if mesh is not None:
        layers = lax.with_sharding_constraint(layers, pages_sharding(mesh, batch))
    # Each group of devices has the pages of its rows and counts them from 0, one device's after the other's.
    rows, pages = jnp.arange(batch, dtype=jnp.int32) % (batch // n_groups), jnp.arange(P, dtype=jnp.int32)
    rounds, device = pages // (n_devices * per_stripe), pages // per_stripe % n_devices
    per_row = P // n_devices  # pages of a row on a device
    first = device * (batch // n_groups * per_row) + rounds * per_stripe + pages % per_stripe
    tables = first[None, :] + rows[:, None] * per_row
    return Cache(layers=layers, block_tables=tables, lengths=jnp.zeros((batch,), jnp.int32))


class Packing(NamedTuple):
    """The real tokens of a padded batch, row after row, then the padding.

    Attributes:
        order: [B * T] int32, the position in the batch [B * T] of each packed token.
        places: [B * T] int32, the reverse: the packed token of each position.
        cu_seqlens: [B + 1] int32, where each row's tokens begin.
    """

    order: Array
    places: Array
    cu_seqlens: Array

    def pack(self, x: Array) -> Array:
        """[B, T, ...] -> [B * T, ...]."""
        return x.reshape(self.order.shape[0], *x.shape[2:])[self.order]

    def unpack(self, x: Array) -> Array:
        """[B * T, ...] -> [B, T, ...]."""
        B = self.cu_seqlens.shape[0] - 1
        return x[self.places].reshape(B, x.shape[0] // B, *x.shape[1:])


def packing(slots: Array) -> Packing:
    """How to pack a batch.

    Args:
        slots: [B, T] int32, each token's number in its sequence, -1 for padding.
    """
    is_real = slots.reshape(-1) >= 0
    # A real token comes after the real ones before it, padding after all real tokens.
    n_before = jnp.cumsum(is_real, dtype=jnp.int32) - is_real.astype(jnp.int32)
    at = jnp.arange(is_real.shape[0], dtype=jnp.int32)
    places = jnp.where(is_real, n_before, jnp.sum(is_real, dtype=jnp.int32) + at - n_before)
    order = jnp.zeros_like(places).at[places].set(at, unique_indices=True)
    sizes = jnp.sum(slots >= 0, axis=1, dtype=jnp.int32)
    return Packing(order, places, jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(sizes, dtype=jnp.int32)]))


def pack(slots: Array, arrays: Any, mesh: Mesh | None) -> tuple[Any, ...]:
    """`cu_seqlens` and arrays [B, T, ...] as `Packing` has them, of each group of rows that `mesh` splits B into."""

    def call(slots: Array, arrays: Any) -> tuple[Any, ...]:
        rows = packing(slots)
        return rows.cu_seqlens, *jax.tree.map(rows.pack, arrays)

    return per_device(call, mesh, (("batch",),) * 2, ("batch",))(slots, arrays)


def unpack(slots: Array, arrays: Any, mesh: Mesh | None) -> Any:
    """The reverse of `pack`, of the arrays."""

    def call(slots: Array, arrays: Any) -> Any:
        return jax.tree.map(packing(slots).unpack, arrays)

    return per_device(call, mesh, (("batch",),) * 2, ("batch",))(slots, arrays)


def over_context(mesh: Mesh | None, batch: int) -> dict[str, Any]:
    """What functions of pages are told where `context` splits the pages of a request, nothing where it does not."""
    if size_of(mesh, "context") == 1:
        return {}
    return dict(mesh=mesh, context_axis="context", data_axis=mesh_axis(mesh, "batch", batch))


def write(
    pages: hj.IndexCache, keys: Array | hj.QuantizedKeys | None, latents: Any, block_tables: Array, slots: Array,
    lengths: Array, mesh: Mesh | None = None,
) -> hj.IndexCache:  # fmt: skip
    """Appends the tokens of a batch to the pages of one layer.

    Args:
        pages: of the layer.
        keys: [B, T, D] index keys; None in layers that have none.
        latents: [B, T, L + R] array, which is quantised if the pages hold `QuantizedLatents`.
        block_tables: [B, P] int32.
        slots: [B, T] int32, -1 for padding.
        lengths: [B] int32, tokens in each row, these among them.
        mesh: what the batch is split over, or None.

    Returns: the pages with the tokens; those that have no page are dropped.
    """
    if keys is None:
        keys = jnp.zeros((*latents.shape[:2], 0), pages.keys.dtype)
    if isinstance(pages.latents, hj.QuantizedLatents):
        latents = hj.quantize_latents(latents, pages.latents.value_dim)
    if over := over_context(mesh, slots.shape[0]):
        cu_seqlens, keys, latents = pack(slots, (keys, latents), mesh)
        before = lengths - jnp.sum(slots >= 0, axis=1, dtype=jnp.int32)
        return hj.append(pages, keys, block_tables, cu_seqlens, before, latents=latents, **over)

    def call(
        pages: hj.IndexCache, keys: Array | hj.QuantizedKeys, latents: Any, tables: Array, slots: Array,
        lengths: Array,
    ) -> hj.IndexCache:  # fmt: skip
        rows = packing(slots)
        before = lengths - jnp.diff(rows.cu_seqlens)
        new, new_latents = jax.tree.map(rows.pack, (keys, latents))
        return hj.append(pages, new, tables, rows.cu_seqlens, before, latents=new_latents)

    call = per_device(call, mesh, (("batch",),) * 6, ("batch",))
    return call(pages, keys, latents, block_tables, slots, lengths)


def plain_latents(
    pages: hj.IndexCache, block_tables: Array, lengths: Array, dtype: DTypeLike, mesh: Mesh | None = None
) -> Array:
    """The latents of each row in one piece [B, P * page_size, L + R], as for `contiguous`, of any form."""
    assert pages.latents is not None  # a model's cache holds them
    found = jax.tree.map(lambda leaf: contiguous(leaf, block_tables, lengths, mesh), pages.latents)
    return found.dequantize().astype(dtype) if isinstance(found, hj.QuantizedLatents) else found


def contiguous(pages: Array, block_tables: Array, lengths: Array, mesh: Mesh | None = None) -> Array:
    """The pages of each row in one piece, zeros where it has no token.

    Args:
        pages: [n_pages, page_size, ...].
        block_tables: [B, P] int32; numbers outside of [0, n_pages) mean no page.
        lengths: [B] int32, tokens in each row.
        mesh: what the batch is split over, or None.

    Returns: [B, P * page_size, ...], zeros where a row has no token, whatever its pages, and other ones, hold there.
    """

    is_shared = size_of(mesh, "context") > 1

    def call(pages: Array, tables: Array, lengths: Array) -> Array:
        (n_pages, page_size, *rest), (B, P) = pages.shape, tables.shape
        if is_shared:
            tables = tables - lax.axis_index("context") * n_pages
        is_page = (tables >= 0) & (tables < n_pages)
        found = pages[jnp.where(is_page, tables, 0)].reshape(B, P * page_size, *rest)
        is_token = jnp.repeat(is_page, page_size, axis=1) & (jnp.arange(P * page_size)[None, :] < lengths[:, None])
        own = jnp.where(is_token.reshape(B, P * page_size, *(1,) * len(rest)), found, jnp.zeros((), found.dtype))
        return lax.psum(own, "context") if is_shared else own  # of each token one device has it, the others 0

    if mesh is None or not is_shared:
        return per_device(call, mesh, (("batch",),) * 3, ("batch",))(pages, block_tables, lengths)
    rows = PartitionSpec(mesh_axis(mesh, "batch", block_tables.shape[0]))
    specs = pages_sharding(mesh, block_tables.shape[0]).spec, rows, rows
    run = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    return run(pages, block_tables, lengths)
