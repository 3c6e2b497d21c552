"""The rows of the scan: whole, and stage by stage; `rows.py` has the others."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import hisa_jax as hj
from bench import shapes
from bench.gpu.inputs import DTYPES, Inputs, draw, paged
from bench.gpu.row import K, Row
from bench.gpu.scan_checks import (
    check_lists,
    check_masks,
    check_refined,
    check_scan,
    check_scan_heads,
    check_thresholds,
)
from hisa_jax.kernels_pallas import mosaic_gpu, scan
from hisa_jax.kernels_pallas.flat_call import FlatCall, flatten
from hisa_jax.kernels_pallas.mosaic_gpu import stages
from hisa_jax.kernels_pallas.operands import ScanHeads
from hisa_jax.layout import Call, Keys
from hisa_jax.methods import Sketch
from hisa_jax.xla.sketch import sizes

_ALIGN = 8  # rows of keys at which a batch begins


def rows() -> Iterator[Row]:
    dsv32, glm5 = shapes.DSV32, shapes.GLM5
    # Both find 0.997 of the flat indexer's tokens on a language model (docs/quality.md).
    fewer = hj.Scan(topk=dsv32.topk, candidates=2 * dsv32.topk, exact_heads=8)
    two_heads = hj.Scan(topk=dsv32.topk, candidates=3 * dsv32.topk, exact_heads=2)
    for context in shapes.CONTEXTS:
        yield whole(dsv32, context)
    for context in (8 * K, 64 * K, 128 * K, 1024 * K):
        yield whole(dsv32, context, method=fewer, name="scan_4k")
        yield whole(dsv32, context, method=two_heads, name="scan_2_heads")
    for context in (64 * K, 128 * K, 1024 * K):
        yield whole(glm5, context)
    yield whole(dsv32, 64 * K, dtype="bf16")
    yield whole(dsv32, 64 * K, implementation="triton")
    for batch in (1, 32, 128):
        for page_size in (64, 128):
            yield decode_paged(dsv32, batch, 128 * K, page_size)
        yield decode_paged(dsv32, batch, 128 * K, 64, sketch="int4")
    for context in (64 * K, 1024 * K):
        yield from of_stages(dsv32, context)


def method_of(model: shapes.Model) -> hj.Scan:
    method = model.methods()["scan"]
    assert isinstance(method, hj.Scan)
    return method


def whole(
    model: shapes.Model,
    context: int,
    *,
    method: hj.Scan | None = None,
    name: str = "scan",
    dtype: str = "e4m3",
    implementation: str = "mosaic_gpu",
    T: int = 4096,
) -> Row:
    """The whole indexer as users call it."""
    chosen, T = method or method_of(model), min(T, context)

    def make():
        inputs = draw(model, 1, T, context, DTYPES[dtype])

        def f(q, k, k_scale, w, positions):
            keys = k if k_scale is None else hj.QuantizedKeys(k, k_scale)
            selection = hj.select(q, keys, w, chosen, query_positions=positions, implementation=implementation)
            return selection.indices, selection.count

        return f, (*inputs[:4], inputs.visible - 1), lambda out: check_scan(out, inputs, chosen)

    return Row(
        row=name,
        make=make,
        implementation=implementation,
        shape=model.name,
        context=context,
        queries=T,
        dtype=dtype,
        flop=T * _flop(model, context, chosen),
    )


def decode_paged(model: shapes.Model, batch: int, context: int, page_size: int, *, sketch: Sketch | None = None) -> Row:
    """One query a sequence, from pages in random order, which may keep sketches."""
    method = dataclasses.replace(method_of(model), sketch=sketch)

    def make():
        inputs = draw(model, batch, 1, context)
        cache, tables = paged(inputs, page_size, has_sketch=sketch is not None)
        offsets = jnp.arange(batch + 1, dtype=jnp.int32)

        def f(q, w, visible, cache, tables, offsets):
            call = Call(q=q, w=w, visible=visible, query_offsets=offsets, table=tables, cache=cache)
            return mosaic_gpu.select_scan(call, method)

        def check(out: Any) -> None:
            check_scan([x[:, None] for x in out], inputs, method)

        return f, (inputs.q[:, 0], inputs.w[:, 0], inputs.visible[:, 0], cache, tables, offsets), check

    scanned = model.D + 4.0 if sketch is None else sum(np.multiply(sizes(model.D), (1, 2))) + 4.0
    pages = "paged" if page_size == 64 else f"paged{page_size}"
    return Row(
        row=f"scan_decode{batch}_{pages}" if sketch is None else f"scan_decode{batch}_sketch",
        make=make,
        shape=model.name,
        context=context,
        queries=batch,
        flop=batch * _flop(model, context, method),
        moved_bytes=batch * (context * scanned + method.block_topk * (model.D + 4.0)),
    )


def of_stages(model: shapes.Model, context: int, T: int = 4096) -> Iterator[Row]:
    """Each stage alone, on what the ones before it give."""
    method = method_of(model)
    m, H, D = method.block_topk, model.H, model.D
    _, most, _, step = scan.ask_of(method, context)
    n, listed, n_samples = method.exact_heads + 2, m + m // 5, context // step  # two rows are the virtual head in e4m3

    def row(name: str, make: Callable, flop: float, moved_bytes: float, **more: Any) -> Row:
        shape: dict[str, Any] = dict(shape=model.name, context=context, queries=T)
        return Row(row=name, make=make, flop=T * flop, moved_bytes=moved_bytes, **shape, **more)

    def heads_of(inputs: Inputs) -> ScanHeads:
        return jax.jit(lambda *x: stages.scan_heads(call_of(*x), method))(*inputs)

    def thresholds_of(heads: ScanHeads, *inputs: Any, rank: int = listed // step) -> Array:
        call = call_of(*inputs)
        samples = stages.scan_sort_keys(call, heads, step)
        return stages.kth(samples, -(-call.visible // step), jnp.full_like(call.visible, rank))

    def masks_of(heads: ScanHeads, threshold: Array, *inputs: Any) -> Array:
        return stages.scan_masks(call_of(*inputs), heads, threshold, method)

    def lists_of(masks: Array, visible: Array) -> tuple[Array, Array]:
        return stages.list_tokens(masks, visible.reshape(-1), most)

    def scan_heads():
        inputs = draw(model, 1, T, context)
        f = lambda *x: stages.scan_heads(call_of(*x), method)  # noqa: E731
        return f, tuple(inputs), lambda heads: check_scan_heads(heads, inputs, method)

    def scan_samples():
        inputs = draw(model, 1, T, context)
        heads = heads_of(inputs)
        check = lambda threshold: check_thresholds(threshold, heads, inputs, step, listed // step)  # noqa: E731
        return thresholds_of, (heads, *inputs), check

    def scan_masks():
        inputs = draw(model, 1, T, context)
        heads = heads_of(inputs)
        threshold = jax.jit(thresholds_of)(heads, *inputs)
        return masks_of, (heads, threshold, *inputs), lambda out: check_masks(out, threshold, heads, inputs)

    def visible_words(masks: Array, operands: tuple) -> Array:
        """Zeros in place of the words that `scan_masks` need not write."""
        *_, visible = operands
        return jnp.where(32 * jnp.arange(masks.shape[1]) < visible.reshape(-1, 1), masks, 0)

    def list_tokens():
        inputs = draw(model, 1, T, context)
        heads = heads_of(inputs)
        masks = jax.jit(masks_of)(heads, jax.jit(thresholds_of)(heads, *inputs), *inputs)
        return lists_of, (masks, inputs.visible), lambda out: check_lists(out, masks, inputs.visible)

    def refine_tokens():
        inputs = draw(model, 1, T, context)
        key = jax.random.key(1)
        # Of a run of tokens each the first or the second: in order, and spread as far as those of a scan are.
        width = context // listed
        starts = jnp.arange(listed, dtype=jnp.int32) * width
        tokens = starts + jax.random.randint(key, (T, listed), 0, width, jnp.int32)
        tokens = jnp.pad(tokens, ((0, 0), (0, most - listed)), constant_values=-1)

        def f(*x):
            *inputs, tokens, count = x
            return stages.refine_tokens(call_of(*inputs), tokens, count, method.topk)

        count = jnp.full((T,), listed, jnp.int32)
        return f, (*inputs, tokens, count), lambda out: check_refined(out, tokens[:, :listed], inputs, method.topk)

    queries, keys = T * H * (D + 4.0), context * (D + 4.0)
    yield row("scan_heads", scan_heads, 2.0 * 256 * H * D, queries)
    yield row("scan_samples", scan_samples, 2.0 * n * D * n_samples, 2 * 4.0 * T * n_samples)
    yield row("scan_masks", scan_masks, 2.0 * n * D * context, keys + T * context / 8, defined=visible_words)
    yield row("list_tokens", list_tokens, 0.0, T * (context / 8 + 4.0 * listed))
    yield row("refine_tokens", refine_tokens, 2.0 * H * D * listed, queries + keys + 4.0 * T * listed)


def call_of(q: Array, k: Array, k_scale: Array | None, w: Array, visible: Array) -> FlatCall:
    """A batch, as the stages take it."""
    return flatten(Call(q=q, w=w, visible=visible, k=Keys(k, k_scale)), _ALIGN)


def _flop(model: shapes.Model, context: int, method: hj.Scan) -> float:
    """Of one query: a virtual head and the exact ones on all keys, all heads on the candidates."""
    kept = min(method.block_topk, context)
    scanned = (method.exact_heads + 1) * context if kept < context else 0
    return 2.0 * model.D * (scanned + model.H * kept)
