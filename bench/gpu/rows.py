"""The rows of `python -m bench gpu`: what runs, on which inputs, and how its result is checked."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import hisa_jax as hj
from bench import shapes
from bench.gpu import attention_rows, entry_rows, limit_rows, scan_rows
from bench.gpu.checks import (
    CHECKED,
    block_means,
    check_attention,
    check_blocks,
    check_flat,
    check_hisa,
    checked_rows,
    scores_of,
)
from bench.gpu.inputs import BF16, DTYPES, draw, paged
from bench.gpu.row import K, Row
from hisa_jax.kernels_pallas import mosaic_gpu
from hisa_jax.kernels_pallas.mosaic_gpu import refine as mosaic_refine
from hisa_jax.kernels_pallas.mosaic_gpu import stages
from hisa_jax.kernels_pallas.mosaic_gpu import topk as mosaic_topk
from hisa_jax.kernels_pallas.operands import KeptBlocks, Operands
from hisa_jax.layout import Call, Keys


def hisa(model: shapes.Model) -> hj.Hisa:
    return hj.Hisa(topk=model.topk, block_size=model.block_size, block_topk=model.block_topk)


def call_of(q: Array, k: Array, k_scale: Array | None, w: Array, visible: Array) -> Call:
    """A batch, as kernels take it."""
    return Call(q=q, w=w, visible=visible, k=Keys(k, k_scale))


def rows() -> Iterator[Row]:
    """All rows, the ones that matter most first."""
    dsv32, glm5 = shapes.DSV32, shapes.GLM5
    yield _hisa(dsv32, 64 * K)
    for context in (8 * K, 16 * K, 32 * K, 128 * K, 256 * K, 1024 * K):
        yield _hisa(dsv32, context)
    for context in (64 * K, 1024 * K):
        yield _hisa(glm5, context)
    yield _hisa(dsv32, 64 * K, dtype="bf16")
    yield _hisa(dsv32, 64 * K, clustered=True)
    yield _refine_scores(dsv32, 64 * K)
    yield _topk(8192, dsv32.topk)
    yield _pool_and_filter(dsv32, 64 * K)
    for context in (16 * K, 64 * K):
        yield _pool_and_filter(dsv32, context, T=1)
    for context in (8 * K, 16 * K, 32 * K, 64 * K, 128 * K):
        yield _flat(dsv32, context)
    yield _flat(glm5, 64 * K)
    yield from scan_rows.rows()
    for batch in (1, 32, 128):
        for page_size in (64, 128):
            yield _decode_paged(dsv32, batch, 128 * K, page_size, dsv32.block_size)
        yield _decode_paged(dsv32, batch, 128 * K, 64, None)
        yield _decode_flat(dsv32, batch, 128 * K, 64)
    for page_size in (64, 128):
        yield _append(dsv32, 128, 8 * K, page_size, None)
    yield _append(dsv32, 128, 8 * K, 64, dsv32.block_size)
    yield _hisa(dsv32, 64 * K, dtype="bf16", implementation="triton")
    yield _hisa(dsv32, 64 * K, implementation="triton")
    for implementation in ("mosaic_gpu", "triton"):
        for model in (dsv32, glm5):
            yield _sparse_mla(model, 1, 4096, 64 * K, implementation)
        for batch in (1, 32, 128):
            yield _sparse_mla(dsv32, batch, 1, 8 * K, implementation)
            yield _sparse_mla(dsv32, batch, 1, 8 * K, implementation, is_quantized=True)
        for model in (dsv32, glm5):
            yield _sparse_mla(model, 1, 4096, 64 * K, implementation, is_quantized=True)
    yield from attention_rows.rows()
    yield from entry_rows.rows()
    yield from limit_rows.rows()


def _hisa(
    model: shapes.Model,
    context: int,
    *,
    dtype: str = "e4m3",
    implementation: str = "mosaic_gpu",
    clustered: bool = False,
) -> Row:
    """The whole indexer as users call it, blocks and all."""
    T = min(4096, context)

    def make():
        inputs = draw(model, 1, T, context, DTYPES[dtype], clustered)

        def f(q, k, k_scale, w, positions):
            selection = hj.select(
                q,
                k if k_scale is None else hj.QuantizedKeys(k, k_scale),
                w,
                model.methods()["hisa"],
                query_positions=positions,
                implementation=implementation,
                return_blocks=True,
            )
            return selection.indices, selection.count, selection.blocks

        return f, (*inputs[:4], inputs.visible - 1), lambda out: check_hisa(out, inputs, model)

    # Where all blocks are kept, their means are not scored.
    kept = min(model.block_topk * model.block_size, context)
    pairs = T * (kept + (context / model.block_size if kept < context else 0))
    return Row(
        row="hisa_clustered" if clustered else "hisa",
        make=make,
        implementation=implementation,
        shape=model.name,
        context=context,
        queries=T,
        dtype=dtype,
        flop=2.0 * pairs * model.H * model.D,
    )


def _flat(model: shapes.Model, context: int) -> Row:
    """The whole flat indexer as users call it."""
    T = min(4096, context)

    def make():
        inputs = draw(model, 1, T, context)

        def f(q, k, k_scale, w, positions):
            method = model.methods()["dsa"]
            keys = hj.QuantizedKeys(k, k_scale)
            selection = hj.select(q, keys, w, method, query_positions=positions, implementation="mosaic_gpu")
            return selection.indices, selection.count

        return f, (*inputs[:4], inputs.visible - 1), lambda out: check_flat(out, inputs, model.topk)

    flop = 2.0 * T * context * model.H * model.D
    return Row(row="flat", make=make, shape=model.name, context=context, queries=T, flop=flop)


def _refine_scores(model: shapes.Model, context: int) -> Row:
    """The token scores of the refinement alone, without its selection."""
    T, m, B = 4096, model.block_topk, model.block_size

    def make():
        q, k, k_scale, w, visible = (x[0] for x in draw(model, 1, T, context))
        blocks = jnp.sort(lax.top_k(jax.random.uniform(jax.random.key(1), (T, context // B)), m)[1], axis=1)

        def f(q, k, k_scale, w, blocks, visible):
            kept = KeptBlocks(ids=blocks, visible=visible, first=jnp.zeros_like(visible), size=B)
            options: Any = dict(config=mosaic_refine.Config(), n_ctas=stages.n_sms())
            return mosaic_refine.refine_scores(Operands(q, w, k, k_scale), kept, **options)

        def check(sort_keys: Any) -> None:
            for t in range(CHECKED):
                tokens = (np.asarray(blocks[t])[:, None] * B + np.arange(B)).ravel()
                wanted = scores_of(q[t], k[tokens], k_scale[tokens], w[t])
                # Sort keys order as the scores do; below 0 all bits but the sign are turned.
                bits = np.asarray(sort_keys[t])
                got = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(np.float32)
                assert np.abs(got - wanted)[tokens < int(visible[t])].max() < 2e-3 * wanted.std()

        return f, (q, k, k_scale, w, blocks.astype(jnp.int32), visible), check

    flop = 2.0 * T * m * B * model.H * model.D
    return Row(row="refine_scores", make=make, shape=model.name, context=context, queries=T, flop=flop)


def _topk(width: int, k: int) -> Row:
    """The exact selection alone."""
    T = 4096

    def make():
        x = jax.lax.bitcast_convert_type(jax.random.normal(jax.random.key(2), (T, width)), jnp.int32)
        x = jnp.where(x < 0, x ^ 0x7FFFFFFF, x)
        limit = jnp.full((T,), width, jnp.int32)

        def check(out: Any) -> None:
            for t in range(CHECKED):
                wanted = np.sort(np.argsort(-np.asarray(x[t]).astype(np.int64), kind="stable")[:k])
                np.testing.assert_array_equal(out[0][t], wanted)

        return lambda x, limit: mosaic_topk.topk(x, limit, k, n_ctas=stages.n_sms()), (x, limit), check

    moved_bytes = 4.0 * T * (width + k)
    return Row(row="topk", make=make, shape=f"{width}_to_{k}", context=width, queries=T, moved_bytes=moved_bytes)


def _pool_and_filter(model: shapes.Model, context: int, T: int = 4096) -> Row:
    """Stage 1 from the keys to the kept blocks."""

    def make():
        inputs = draw(model, 1, T, context)

        def f(*operands):
            return mosaic_gpu.select_blocks(call_of(*operands), hisa(model)).reshape(1, T, -1)

        def check(blocks: Any) -> None:
            q, k, k_scale, w, visible = inputs
            means = block_means(k[0], k_scale[0], model.block_size)
            for b, t in checked_rows(1, T):
                scores = scores_of(q[b, t], means, None, w[b, t])
                check_blocks(np.asarray(blocks[b, t]), scores, int(visible[b, t]), model)

        return f, inputs, check

    return Row(
        row="pool_and_block_filter" if T > 1 else "pool_and_block_filter_decode1",
        make=make,
        shape=model.name,
        context=context,
        queries=T,
        flop=2.0 * T * (context / model.block_size) * model.H * model.D,
        moved_bytes=context * (model.D + 4.0) + T * model.H * (model.D + 4.0),
    )


def _decode_paged(model: shapes.Model, batch: int, context: int, page_size: int, block_size: int | None) -> Row:
    """One query a sequence, from pages in random order, which keep means of `block_size`; None: sums are added."""
    P = context // page_size

    def make():
        inputs = draw(model, batch, 1, context)
        cache, tables = paged(inputs, page_size, block_size=block_size)
        offsets = jnp.arange(batch + 1, dtype=jnp.int32)

        def f(q, w, visible, cache, tables, offsets):
            call = Call(q=q, w=w, visible=visible, query_offsets=offsets, table=tables, cache=cache)
            return mosaic_gpu.select_hisa(call, hisa(model))

        def check(out: Any) -> None:
            check_hisa([x[:, None] for x in out], inputs, model)

        return f, (inputs.q[:, 0], inputs.w[:, 0], inputs.visible[:, 0], cache, tables, offsets), check

    tokens = batch * model.block_topk * model.block_size
    # Means that pages keep are read in two e4m3 parts; where they keep none, their float32 sums.
    kept_bytes, n_blocks = 2.0 * model.D + 4.0, context // model.block_size
    mean_bytes = n_blocks * kept_bytes if block_size else P * (4.0 * model.D + 8.0)
    own = "" if block_size else "_sums"
    return Row(
        row=f"decode{batch}_paged{own}" if page_size < model.block_size else f"decode{batch}_paged{page_size}",
        make=make,
        shape=model.name,
        context=context,
        queries=batch,
        flop=2.0 * (tokens + batch * context / model.block_size) * model.H * model.D,
        moved_bytes=tokens * (model.D + 4.0) + batch * mean_bytes,
    )


def _decode_flat(model: shapes.Model, batch: int, context: int, page_size: int) -> Row:
    """The flat indexer for one query a sequence, from pages in random order."""

    def make():
        inputs = draw(model, batch, 1, context)
        cache, tables = paged(inputs, page_size)
        offsets = jnp.arange(batch + 1, dtype=jnp.int32)

        def f(q, w, visible, cache, tables, offsets):
            call = Call(q=q, w=w, visible=visible, query_offsets=offsets, table=tables, cache=cache)
            return mosaic_gpu.select_flat(call, model.topk)

        check = lambda out: check_flat([x[:, None] for x in out], inputs, model.topk)  # noqa: E731
        return f, (inputs.q[:, 0], inputs.w[:, 0], inputs.visible[:, 0], cache, tables, offsets), check

    return Row(
        row=f"flat_decode{batch}_paged",
        make=make,
        shape=model.name,
        context=context,
        queries=batch,
        flop=2.0 * batch * context * model.H * model.D,
        moved_bytes=batch * context * (model.D + 4.0),
    )


def _append(model: shapes.Model, batch: int, context: int, page_size: int, block_size: int | None) -> Row:
    """A new token each, written in the middle of a page, whose sum is taken anew."""

    def make():
        inputs = draw(model, batch, 1, context)
        cache, tables = paged(inputs, page_size, block_size=block_size)
        # Half of the last page is filled.
        lengths = jnp.full((batch,), context - page_size // 2, jnp.int32)
        new = hj.QuantizedKeys(inputs.k[:, 0], inputs.k_scale[:, 0])
        offsets = jnp.arange(batch + 1, dtype=jnp.int32)

        def check(got: Any) -> None:
            page, place = np.asarray(tables)[:, -1], page_size // 2
            np.testing.assert_array_equal(got.keys[page, place], new.values)
            np.testing.assert_array_equal(got.scales[page, place], new.scales)
            np.testing.assert_array_equal(got.counts[page], place + 1)
            values = np.asarray(got.keys[page], np.float32) * got.scales[page][:, :, None]
            np.testing.assert_allclose(got.sums[page], values[:, : place + 1].sum(1), atol=1e-3)
            means = np.asarray(got.means[page], np.float32).sum(1) * np.asarray(got.mean_scales[page])[:, None]
            np.testing.assert_allclose(means, got.sums[page] / (place + 1), atol=5e-3)

        return hj.append, (cache, new, tables, offsets, lengths), check

    return Row(
        row=f"append{batch}{'_blocks' if block_size else ''}{'' if page_size == 64 else f'_pages{page_size}'}",
        make=make,
        implementation="triton",
        carries=True,
        shape=model.name,
        context=context,
        queries=batch,
        moved_bytes=batch * (page_size * (model.D + 4.0) + 6.0 * model.D),
    )


def _sparse_mla(
    model: shapes.Model, batch: int, T: int, context: int, implementation: str, *, is_quantized: bool = False
) -> Row:
    """The sparse attention over 2048 tokens spread over the context, latents in bfloat16 or in 8 bits."""
    N, E, V, topk = model.mla_heads, model.mla_dim, model.mla_value_dim, model.topk
    options = dict(value_dim=V, scale=E**-0.5)

    def make():
        keys = jax.random.split(jax.random.key(3), 3)
        q = jax.random.normal(keys[0], (batch, T, N, E), BF16)
        kv = jax.random.normal(keys[1], (batch, context, E), BF16)
        starts = jax.random.randint(keys[2], (batch, T, 1), 0, context // topk)
        indices = (starts + jnp.arange(topk) * (context // topk)).astype(jnp.int32)
        f = lambda *x: hj.sparse_mla(*x, **options, implementation=implementation)  # noqa: E731
        latents = jax.jit(hj.quantize_latents)(kv) if is_quantized else kv
        plain = latents.dequantize() if isinstance(latents, hj.QuantizedLatents) else kv
        return f, (q, latents, indices), lambda out: check_attention(out, q, plain, indices, **options)

    # Decoding reads the listed tokens; many queries of a prefill read the whole context between them.
    n = batch * T
    return Row(
        row=("sparse_mla" if T > 1 else f"sparse_mla_decode{batch}") + ("_8bit" if is_quantized else ""),
        make=make,
        implementation=implementation,
        shape=model.name,
        context=context,
        queries=n,
        dtype="bf16",
        flop=2.0 * n * N * topk * (E + V),
        moved_bytes=2.0 * n * N * (E + V) + (n * topk if T == 1 else context) * (656.0 if is_quantized else 2.0 * E),
    )
