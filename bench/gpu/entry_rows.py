"""The rows of indexers over pools: a key is an entry of several tokens, and 1M tokens are 262,144 keys at r = 4."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

import hisa_jax as hj
from bench import shapes
from bench.gpu.checks import check_flat, check_hisa
from bench.gpu.inputs import E4M3, Inputs, draw, paged
from bench.gpu.row import K, Row
from bench.gpu.scan_checks import check_scan
from hisa_jax import kernel_heads
from hisa_jax.layout import Call, Keys


def rows() -> Iterator[Row]:
    glm, qsa = shapes.GLM53_FLASH, shapes.QSA
    few = dataclasses.replace(_scan(qsa), exact_heads=1)
    for model, scan in ((glm, _scan(glm)), (qsa, few)):
        methods = model.methods()
        for method in (methods["dsa"], methods["hisa"], scan):
            yield prefill(model, method, 1024 * K)
            for batch in (1, 32, 128):
                yield decode(model, method, batch, 1024 * K)


def prefill(
    model: shapes.Model, method: hj.Method, context: int, *, T: int = 4096, implementation: str = "mosaic_gpu"
) -> Row:
    """The last T queries of a context of tokens."""

    def make():
        inputs = _draw(model, 1, T, context)

        def f(q: Array, k: Array, k_scale: Array, w: Array, positions: Array) -> Any:
            keys = hj.QuantizedKeys(k, k_scale)
            options: Any = dict(query_positions=positions, return_blocks=isinstance(method, hj.Hisa))
            found = hj.select(q, keys, w, method, **options, implementation=implementation)
            return found.indices, found.count, found.blocks

        return f, (*inputs[:4], inputs.visible - 1), lambda out: check(out, inputs, model, method)

    return Row(
        row=f"entries_{_name(method)}",
        make=make,
        implementation=implementation,
        shape=model.name,
        context=context,
        queries=T,
        flop=T * _flop(model, method, context // model.entry_size),
    )


def decode(
    model: shapes.Model, method: hj.Method, batch: int, context: int, *, implementation: str = "mosaic_gpu"
) -> Row:
    """One query a sequence, from pages in random order: of a block, which keep its mean, or of 64 entries."""
    is_hisa = isinstance(method, hj.Hisa)
    page_size = model.block_size if is_hisa else 64

    def make():
        inputs = _draw(model, batch, 1, context)
        by_entries = inputs._replace(visible=inputs.visible // model.entry_size)
        cache, tables = paged(by_entries, page_size, entry_size=model.entry_size)
        offsets = jnp.arange(batch + 1, dtype=jnp.int32)

        def f(q: Array, w: Array, cache: hj.IndexCache, tables: Array, offsets: Array, lengths: Array) -> Any:
            options: Any = dict(return_blocks=is_hisa, implementation=implementation)
            found = hj.select_paged(q, w, cache, tables, offsets, lengths, method, **options)
            return found.indices, found.count, found.blocks

        def check_all(out: Any) -> None:
            check([None if x is None else x[:, None] for x in out], inputs, model, method)

        return f, (inputs.q[:, 0], inputs.w[:, 0], cache, tables, offsets, inputs.visible[:, 0]), check_all

    E, D = context // model.entry_size, model.D
    if isinstance(method, hj.Hisa):  # means that pages keep have two e4m3 parts
        read = method.block_topk * method.block_size * (D + 4.0) + E / method.block_size * (2 * D + 4.0)
    else:
        read = (E + (method.block_topk if isinstance(method, hj.Scan) else 0)) * (D + 4.0)
    return Row(
        row=f"entries_{_name(method)}_decode{batch}",
        make=make,
        implementation=implementation,
        shape=model.name,
        context=context,
        queries=batch,
        flop=batch * _flop(model, method, E),
        moved_bytes=batch * read,
    )


def check(out: Any, inputs: Inputs, model: shapes.Model, method: hj.Method) -> None:
    """`out`: indices, count and, of HISA, blocks, [B, T, ...]; `inputs`: with `visible` in tokens."""
    indices, count, blocks = (None if x is None else np.asarray(x) for x in out)
    assert indices is not None
    assert count is not None
    r, seen = model.entry_size, np.asarray(inputs.visible)
    chosen, tail = np.split(indices, [model.topk * r], axis=-1)
    # A context has more entries than are chosen, so that every list of them is full.
    members = chosen.reshape(*chosen.shape[:-1], model.topk, r)
    np.testing.assert_array_equal(members, members[..., :1] + np.arange(r))
    ends = (seen // r * r)[..., None] + np.arange(r - 1)
    np.testing.assert_array_equal(tail, np.where(ends < seen[..., None], ends, -1))
    np.testing.assert_array_equal(count, model.topk * r + seen % r)
    found = members[..., 0] // r, np.full_like(count, model.topk)
    by_entries = inputs._replace(visible=inputs.visible // r)
    if isinstance(method, hj.Hisa):
        check_hisa((*found, blocks), by_entries, model)
    elif isinstance(method, hj.Scan):
        call = Call(q=inputs.q, w=inputs.w, visible=by_entries.visible, k=Keys(inputs.k, inputs.k_scale))
        heads, by_heads = kernel_heads.as_kernels_take(call, dataclasses.replace(method, entry_size=1, tail=None))
        assert isinstance(by_heads, hj.Scan)
        check_scan(found, by_entries._replace(q=heads.q, w=heads.w), by_heads)
    else:
        check_flat(found, by_entries, model.topk)


def _draw(model: shapes.Model, B: int, T: int, context: int) -> Inputs:
    """Keys of entries, `visible` in tokens."""
    inputs = draw(model, B, T, context // model.entry_size, E4M3)
    seen = jnp.arange(context - T + 1, context + 1, dtype=jnp.int32)
    return inputs._replace(visible=jnp.broadcast_to(seen, (B, T)))


def _scan(model: shapes.Model) -> hj.Scan:
    method = model.methods()["scan"]
    assert isinstance(method, hj.Scan)
    return method


def _name(method: hj.Method) -> str:
    return {hj.Dsa: "flat", hj.Hisa: "hisa", hj.Scan: "scan"}[type(method)]


def _flop(model: shapes.Model, method: hj.Method, E: int) -> float:
    """Of one query, in products of the model's own heads."""
    pairs = float(E * model.H)
    if isinstance(method, hj.Hisa):
        pairs = model.H * (method.block_topk * method.block_size + E / method.block_size)
    elif isinstance(method, hj.Scan):
        pairs = (method.exact_heads + 1) * E + model.H * method.block_topk
    return 2.0 * model.D * pairs
