"""The rows of `python -m bench tpu`: what runs, on which inputs, what it costs by the schedule, how it is checked."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import hisa_jax as hj
from bench import shapes
from bench.gpu import limit_rows
from bench.gpu.checks import CHECKED, TOKENS, check_attention, check_flat, check_hisa, checked_rows, scores_of
from bench.gpu.inputs import Inputs
from bench.tpu import cost
from bench.tpu.chips import Chip
from hisa_jax import entries
from hisa_jax.kernels_pallas import mosaic_tpu
from hisa_jax.kernels_pallas.mosaic_tpu import pool, ragged, select
from hisa_jax.kernels_pallas.mosaic_tpu.config import Choice
from hisa_jax.kernels_pallas.mosaic_tpu.sparse_mla import sparse_mla
from hisa_jax.kernels_pallas.mosaic_tpu.topk import topk
from hisa_jax.layout import Call, Keys

DTYPES: dict[str, Any] = {"bf16": jnp.bfloat16, "int8": jnp.int8, "e4m3": jnp.float8_e4m3fn}
K = 1024
MODEL = shapes.DSV32
PREFILLS = (
    (8 * K, "bf16"),
    (32 * K, "bf16"),
    (128 * K, "bf16"),
    (1024 * K, "bf16"),
    (128 * K, "int8"),
    (128 * K, "e4m3"),
)
SCANS = {
    "scan_2": hj.Scan(topk=MODEL.topk, candidates=3 * MODEL.topk, unit=2),
    "scan_4": hj.Scan(topk=MODEL.topk, candidates=3 * MODEL.topk, unit=4),
    "scan": hj.Scan(topk=MODEL.topk),
}
# By the best token of each block: what chooses, in how many sequences, with how many last tokens.
UNITS = {
    "units": (limit_rows.M3, limit_rows.EACH_HEAD, 1, shapes.PREFILL.T),
    "units_decode32": (limit_rows.M3, limit_rows.EACH_HEAD, 32, 1),
    "units_source": (limit_rows.V41, limit_rows.SOURCE, 1, shapes.PREFILL.T),
}
Shaped = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        queries: of all sequences; `context`: tokens of each.
        f: what is compiled, or timed, on operands like `operands`, of which the last is int32.
        draw: () -> operands to run it on; `check`: (result, operands) -> raises if the result is wrong.
        model: whose heads they are.
        kernels: what is multiplied with the schedules, for one TensorCore of a chip.
        flop: arithmetic of the visible work.
    """

    row: str
    context: int
    dtype: str
    queries: int = shapes.PREFILL.T
    model: shapes.Model = MODEL
    f: Callable
    operands: tuple
    draw: Callable[[], tuple]
    check: Callable[[Any, tuple], None]
    kernels: Callable[[Chip], list[cost.Kernel]]
    flop: float = 0.0

    def __str__(self) -> str:
        return f"{self.row} {shapes.label(self.context)} {self.dtype}"


def rows() -> Iterator[Row]:
    """All rows; a flat one before the hierarchical one that is compared with it."""
    yield _topk(MODEL.block_topk * MODEL.block_size)
    yield _sparse_mla(128 * K)
    for context, dtype in PREFILLS:
        yield _flat(shapes.PREFILL, context, dtype)
        yield _hisa(context, dtype)
    for name, method in SCANS.items():
        yield _scan(name, method, 128 * K)
    for name in UNITS:
        yield _units(name, 128 * K, "bf16")
    yield _units("units", 128 * K, "e4m3")
    for phase in shapes.DECODES:
        yield _flat(phase, 128 * K, "bf16")
        yield _decode(phase.B, 128 * K, "bf16")


def _topk(width: int) -> Row:
    T, k = shapes.PREFILL.T, MODEL.topk

    def draw() -> tuple:
        return jax.random.randint(jax.random.key(0), (T, width), -(1 << 30), 1 << 30), jnp.full((T,), width, jnp.int32)

    def check(out: Any, operands: tuple) -> None:
        for t in range(CHECKED):
            wanted = np.sort(np.argsort(-np.asarray(operands[0][t]).astype(np.int64), kind="stable")[:k])
            np.testing.assert_array_equal(out[0][t], wanted)

    return Row(
        row="topk",
        context=width,
        dtype="int32",
        f=lambda x, n: topk(x, n, k),
        operands=(Shaped((T, width), jnp.int32), Shaped((T,), jnp.int32)),
        draw=draw,
        check=check,
        kernels=lambda chip: cost.topk_kernels(chip, T, width, k),
    )


def _flat(phase: shapes.Phase, context: int, dtype: str) -> Row:
    B, T = phase.B, phase.T

    def f(*operands: Array) -> Any:
        call = call_of(*operands)
        return call.unflatten(mosaic_tpu.select_flat(call, MODEL.topk))

    return Row(
        row="flat" if phase is shapes.PREFILL else f"flat_{phase.name}",
        context=context,
        dtype=dtype,
        queries=B * T,
        f=f,
        operands=indexer_operands(MODEL, B, T, context, dtype),
        draw=functools.partial(draw_indexer, B, T, context, dtype),
        check=lambda out, operands: check_flat(out, operands, MODEL.topk),
        kernels=lambda chip: cost.flat_kernels(chip, MODEL, B, T, context, dtype),
        flop=2.0 * B * T * (context - (T - 1) / 2) * MODEL.H * MODEL.D,
    )


def _hisa(context: int, dtype: str) -> Row:
    T = shapes.PREFILL.T
    method = hj.Hisa(topk=MODEL.topk, block_size=MODEL.block_size, block_topk=MODEL.block_topk)

    def f(*operands: Array) -> Any:
        call = call_of(*operands)
        return call.unflatten(mosaic_tpu.select_hisa(call, method))

    return Row(
        row="hisa",
        context=context,
        dtype=dtype,
        f=f,
        operands=indexer_operands(MODEL, 1, T, context, dtype),
        draw=functools.partial(draw_indexer, 1, T, context, dtype),
        check=lambda out, operands: check_hisa(out, operands, MODEL),
        kernels=lambda chip: cost.hisa_kernels(chip, MODEL, T, context, dtype),
        flop=_hisa_flop(T, context),
    )


def _scan(name: str, method: hj.Scan, context: int) -> Row:
    """Eight queries side by side are taken to keep `cost.UNION` times what one does; those that are drawn keep more."""
    T = shapes.PREFILL.T

    def f(*operands: Array) -> Any:
        call = call_of(*operands)
        return call.unflatten(mosaic_tpu.select_scan(call, method))

    return Row(
        row=name,
        context=context,
        dtype="bf16",
        f=f,
        operands=indexer_operands(MODEL, 1, T, context, "bf16"),
        draw=functools.partial(draw_indexer, 1, T, context, "bf16"),
        check=lambda out, operands: _check_scan(out, operands, method),
        kernels=lambda chip: cost.scan_kernels(chip, MODEL, method, T, context),
        flop=2.0
        * T
        * MODEL.D
        * ((method.exact_heads + 1) * (context - (T - 1) / 2) + MODEL.H * method.block_topk * method.unit),
    )


def _check_scan(out: Any, operands: tuple, method: hj.Scan) -> None:
    """No worse than the tokens of exactly the candidates, which XLA takes; what is better is allowed."""
    q, k, _, w, visible = operands
    for b, t in checked_rows(*visible.shape):
        query = (q[b : b + 1, t : t + 1], k[b : b + 1], w[b : b + 1, t : t + 1])
        own = hj.select(*query, method, query_positions=visible[b : b + 1, t : t + 1] - 1, implementation="xla")
        chosen, wanted = np.asarray(out[0][b, t]), np.asarray(own.indices[0, 0])
        n = int(out[1][b, t])
        assert n == int(own.count[0, 0]) and (chosen[n:] == -1).all() and (np.diff(chosen[:n]) > 0).all()
        got, least = (np.sort(scores_of(q[b, t], k[b, x[:n]], None, w[b, t])) for x in (chosen, wanted))
        assert (got >= least - TOKENS * least.std()).all()


def _units(name: str, context: int, dtype: str) -> Row:
    model, method, B, T = UNITS[name]

    def f(*operands: Array) -> Any:
        call = call_of(*operands)
        blocks = mosaic_tpu.select_blocks(entries.as_keys(call, call.visible, method), method)
        return blocks.reshape(B, T, *([model.H] if method.per_head else []), -1)

    return Row(
        row=name,
        context=context,
        dtype=dtype,
        queries=B * T,
        model=model,
        f=f,
        operands=indexer_operands(model, B, T, context, dtype),
        draw=functools.partial(draw_indexer, B, T, context, dtype, model),
        check=lambda out, operands: limit_rows.check_units(out, Inputs(*operands), method),
        kernels=lambda chip: cost.units_kernels(chip, model, method, B, T, context, dtype),
        flop=2.0 * B * T * (context - (T - 1) / 2) * model.H * model.D,
    )


def _decode(B: int, context: int, dtype: str) -> Row:
    """One query a sequence; block means are kept, as a server keeps them."""
    n, block_size = context // MODEL.block_size, MODEL.block_size
    method = hj.Hisa(topk=MODEL.topk, block_size=block_size, block_topk=MODEL.block_topk)

    def f(q: Array, k: Array, k_scale: Array | None, w: Array, means: Array, visible: Array) -> tuple:
        call = dataclasses.replace(call_of(q, k, k_scale, w, visible), lengths=visible[:, 0])
        queries, batch = ragged.of_call(call, block_size, means)
        blocks = select.kept_blocks(queries, batch, select.of_blocks(method, False))
        n_visible = select.candidates(blocks, queries.visible, block_size)
        queries = queries._replace(visible=n_visible)
        (chosen,) = select.best_tokens(queries, batch, blocks, Choice(k=method.topk))
        return call.unflatten((chosen, jnp.minimum(n_visible, method.topk), blocks))

    def draw() -> tuple:
        *inputs, visible = draw_indexer(B, 1, context, dtype)
        return *inputs, pool.pool(ragged.in_blocks(inputs[1], inputs[2], block_size), visible[:, 0]), visible

    *inputs, visible = indexer_operands(MODEL, B, 1, context, dtype)
    return Row(
        row=f"hisa_decode{B}",
        context=context,
        dtype=dtype,
        queries=B,
        f=f,
        operands=(*inputs, Shaped((B, n, MODEL.D), jnp.float32), visible),
        draw=draw,
        check=lambda out, operands: check_hisa(out, (*operands[:4], operands[-1]), MODEL),
        kernels=lambda chip: cost.decode_kernels(chip, MODEL, B, context, dtype),
        flop=B * _hisa_flop(1, context),
    )


def _sparse_mla(context: int) -> Row:
    """Over the tokens of every second block of the last 128, every fourth of them."""
    T, N, E, V = shapes.PREFILL.T, MODEL.mla_heads, MODEL.mla_dim, MODEL.mla_value_dim
    options: Any = dict(value_dim=V, scale=E**-0.5)
    operands = (
        Shaped((1, T, N, E), jnp.bfloat16),
        Shaped((1, context, E), jnp.bfloat16),
        Shaped((1, T, MODEL.topk), jnp.int32),
    )

    def draw() -> tuple:
        q, kv = (jax.random.normal(jax.random.key(i), x.shape).astype(x.dtype) for i, x in enumerate(operands[:2]))
        token = jnp.arange(MODEL.topk, dtype=jnp.int32)
        listed = context - 16384 + token // 32 * 256 + token % 32 * 4
        return q, kv, jnp.broadcast_to(listed, operands[2].shape)

    return Row(
        row="mla",
        context=context,
        dtype="bf16",
        f=lambda *operands: sparse_mla(*operands, **options),
        operands=operands,
        draw=draw,
        check=lambda out, operands: check_attention(out[0], *operands, **options),
        kernels=lambda chip: cost.sparse_mla_kernels(chip, MODEL, T),
        flop=2.0 * T * MODEL.topk * N * (E + V),
    )


def call_of(q: Array, k: Array, k_scale: Array | None, w: Array, visible: Array) -> Call:
    """A batch, as kernels take it."""
    return Call(q=q, w=w, visible=visible, k=Keys(k, k_scale))


def indexer_operands(model: shapes.Model, B: int, T: int, S: int, dtype: str) -> tuple:
    """q, k, k_scale, w, visible."""
    q, k = Shaped((B, T, model.H, model.D), DTYPES[dtype]), Shaped((B, S, model.D), DTYPES[dtype])
    scale = None if dtype == "bf16" else Shaped((B, S), jnp.float32)
    return q, k, scale, Shaped((B, T, model.H), jnp.float32), Shaped((B, T), jnp.int32)


def draw_indexer(B: int, T: int, S: int, dtype: str, model: shapes.Model = MODEL) -> tuple:
    """Normal queries, keys and weights; the last T queries of the context; positive scales."""
    keys = jax.random.split(jax.random.key(0), (4, B))
    factor = 30.0 if dtype == "int8" else 1.0

    def draw(keys: Array, *shape: int) -> Array:
        # One sequence at a time: float32 keys of 128 at 128K are more than a v5e has.
        return lax.map(lambda key: (factor * jax.random.normal(key, shape)).astype(DTYPES[dtype]), keys)

    q, k = draw(keys[0], T, model.H, model.D), draw(keys[1], S, model.D)
    scales = None if dtype == "bf16" else jnp.exp(0.1 * jax.random.normal(keys[2, 0], (B, S)))
    w = 0.01 * jax.random.normal(keys[3, 0], (B, T, model.H))
    return q, k, scales, w, jnp.broadcast_to(jnp.arange(S - T + 1, S + 1, dtype=jnp.int32), (B, T))


def _hisa_flop(T: int, context: int) -> float:
    """Of the means and the kept blocks of one sequence."""
    visible = context - (T - 1) / 2
    kept = min(MODEL.block_topk * MODEL.block_size, visible)
    has_filter = context > MODEL.block_topk * MODEL.block_size
    return 2.0 * T * (kept + has_filter * visible / MODEL.block_size) * MODEL.H * MODEL.D
