"""The rows of what indexers differ in: blocks by their best token, published lists, budgets, a ratio of blocks."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hisa_jax as hj
from bench import shapes
from bench.gpu.checks import TOKENS, check_hisa, check_tokens, checked_rows, scores_of
from bench.gpu.inputs import BF16, DTYPES, Inputs, draw, paged
from bench.gpu.row import K, Row
from hisa_jax.methods import least_blocks

# MiniMax-M3's four heads that choose alone; the source layer of DeepSeek-V4.1, and a later one.
M3 = dataclasses.replace(shapes.DSV32, name="minimax_m3", H=4)
EACH_HEAD = hj.BlockSparse(
    topk=2048, block_size=128, keep_first=0, scored_by="max", activation=None, per_head=True
)  # fmt: skip
V41 = dataclasses.replace(shapes.GLM5, name="deepseek_v41", topk=512)
SOURCE = hj.BlockSparse(topk=16384, block_size=8, keep_first=0, scored_by="max")


def rows() -> Iterator[Row]:
    yield units(M3, EACH_HEAD, 128 * K)
    yield units_decode(M3, EACH_HEAD, 32, 128 * K)
    yield listed(V41, SOURCE, 1, 4096, 128 * K)
    yield units(V41, SOURCE, 128 * K)
    yield units(M3, EACH_HEAD, 64 * K)
    for batch in (1, 128):
        yield units_decode(M3, EACH_HEAD, batch, 128 * K)
    yield listed(V41, SOURCE, 32, 1, 128 * K)
    yield units(V41, SOURCE, 128 * K, implementation="triton")
    yield listed(V41, SOURCE, 1, 4096, 128 * K, implementation="triton")
    yield budget(shapes.DSV32, 64 * K)
    yield ratio(shapes.DSV32, 64 * K)


def units(
    model: shapes.Model, method: hj.BlockSparse, context: int, *, T: int = 4096, implementation: str = "mosaic_gpu"
) -> Row:
    """The last T queries of one sequence: their blocks."""

    def make() -> Any:
        inputs = draw(model, 1, T, context, BF16)
        w = None if method.per_head else inputs.w

        def f(q: Any, k: Any, positions: Any) -> Any:
            options: Any = dict(query_positions=positions, return_blocks=True, implementation=implementation)
            return hj.select(q, k, w, method, **options).blocks

        return f, (inputs.q, inputs.k, inputs.visible - 1), lambda out: check_units(out, inputs, method)

    flop = 2.0 * T * context * model.H * model.D
    return _row(
        "units" if method.per_head else "units_source",
        model,
        context,
        T,
        make,
        flop=flop,
        implementation=implementation,
    )


def units_decode(model: shapes.Model, method: hj.BlockSparse, batch: int, context: int) -> Row:
    """One query a request, from pages of 128 in random order."""

    def make() -> Any:
        inputs = draw(model, batch, 1, context, BF16)
        cache, tables = paged(inputs, 128)
        offsets = jnp.arange(batch + 1, dtype=jnp.int32)

        def f(q: Any, cache: Any, tables: Any, lengths: Any) -> Any:
            options: Any = dict(return_blocks=True, implementation="mosaic_gpu")
            return hj.select_paged(q, None, cache, tables, offsets, lengths, method, **options).blocks

        operands = inputs.q[:, 0], cache, tables, inputs.visible[:, 0]
        return f, operands, lambda out: check_units(out[:, None], inputs, method)

    return _row(f"units_decode{batch}", model, context, batch, make, moved_bytes=2.0 * batch * context * model.D)


def listed(
    model: shapes.Model, source: hj.BlockSparse, B: int, T: int, context: int, *, implementation: str = "mosaic_gpu"
) -> Row:
    """Queries that choose among the tokens of the blocks that another layer has published."""

    def make() -> Any:
        inputs = draw(model, B, T, context, BF16)
        n, m, size = context // source.block_size, source.block_topk, source.block_size
        ids = jax.lax.map(
            lambda key: jax.random.choice(key, n, (m,), replace=False), jax.random.split(jax.random.key(3), B * T)
        )
        ids = ids.reshape(B, T, m).astype(jnp.int32)

        def f(q: Any, k: Any, w: Any, ids: Any, positions: Any) -> Any:
            candidates, method = hj.CandidateBlocks(ids, size), hj.Dsa(topk=model.topk)
            options: Any = dict(query_positions=positions, candidates=candidates, implementation=implementation)
            found = hj.select(q, k, w, method, **options)
            return found.indices, found.count

        def check(out: Any) -> None:
            for b, t in checked_rows(B, T):
                tokens = (np.sort(np.asarray(ids[b, t]))[:, None] * size + np.arange(size)).ravel()
                tokens = tokens[tokens < int(inputs.visible[b, t])]
                scores = scores_of(inputs.q[b, t], inputs.k[b, tokens], None, inputs.w[b, t])
                check_tokens(out[0][b, t], out[1][b, t], scores, tokens, model.topk)

        return f, (*inputs[:2], inputs.w, ids, inputs.visible - 1), check

    n_listed = source.block_topk * source.block_size
    name, flop = "listed" if T > 1 else f"listed_decode{B}", 2.0 * B * T * n_listed * model.H * model.D
    moved = 2.0 * B * n_listed * model.D if T == 1 else 0.0
    return _row(name, model, context, B * T, make, flop=flop, moved_bytes=moved, implementation=implementation)


def budget(model: shapes.Model, context: int) -> Row:
    """HISA whose queries choose fewer than `topk` each, any number of tokens."""
    T = 4096

    def make() -> Any:
        inputs = draw(model, 1, T, context, DTYPES["e4m3"])
        most = jax.random.randint(jax.random.key(3), (1, T), 0, model.topk + 1, jnp.int32)

        def f(q: Any, k: Any, k_scale: Any, w: Any, most: Any, positions: Any) -> Any:
            keys, options = hj.QuantizedKeys(k, k_scale), dict(query_positions=positions, budget=most)
            found = hj.select(
                q, keys, w, model.methods()["hisa"], return_blocks=True, implementation="mosaic_gpu", **options
            )
            return found.indices, found.count, found.blocks

        def check(out: Any) -> None:
            q, k, k_scale, w, visible = inputs
            for b, t in checked_rows(1, T):
                tokens = (np.asarray(out[2][b, t])[:, None] * model.block_size + np.arange(model.block_size)).ravel()
                tokens = tokens[tokens < int(visible[b, t])]
                scores = scores_of(q[b, t], k[b, tokens], k_scale[b, tokens], w[b, t])
                if n := int(most[b, t]):
                    check_tokens(out[0][b, t], out[1][b, t], scores, tokens, n)
                else:
                    assert int(out[1][b, t]) == 0 and (np.asarray(out[0][b, t]) == -1).all()

        return f, (*inputs[:4], most, inputs.visible - 1), check

    pairs = T * (model.block_topk * model.block_size + context / model.block_size)
    return _row("hisa_budget", model, context, T, make, flop=2.0 * pairs * model.H * model.D, dtype="e4m3")


def ratio(model: shapes.Model, context: int) -> Row:
    """HISA that keeps an eighth of what a query sees."""
    T, method = 4096, hj.Hisa(topk=model.topk, block_size=model.block_size, block_topk=128, block_ratio=8)
    n_kept = max(context // model.block_size // 8, least_blocks(method))

    def make() -> Any:
        inputs = draw(model, 1, T, context, DTYPES["e4m3"])

        def f(q: Any, k: Any, k_scale: Any, w: Any, positions: Any) -> Any:
            options: Any = dict(query_positions=positions, return_blocks=True, implementation="mosaic_gpu")
            found = hj.select(q, hj.QuantizedKeys(k, k_scale), w, method, **options)
            return found.indices, found.count, found.blocks

        def check(out: Any) -> None:
            # Of the last queries, whose number of blocks is the same.
            last = [x[:, -model.block_size :] for x in out]
            some = Inputs(*(x[:, -model.block_size :] if x.shape[1] == T else x for x in inputs))
            check_hisa(last, some, dataclasses.replace(model, block_topk=n_kept))

        return f, (*inputs[:4], inputs.visible - 1), check

    pairs = T * (n_kept * model.block_size + context / model.block_size)
    return _row("hisa_ratio8", model, context, T, make, flop=2.0 * pairs * model.H * model.D, dtype="e4m3")


def check_units(out: Any, inputs: Inputs, method: hj.BlockSparse) -> None:
    """`out`: blocks [B, T, m], or [B, T, H, m] of heads that choose alone."""
    q, k, _, w, visible = inputs
    size, m = method.block_size, method.block_topk
    for b, t in checked_rows(*visible.shape):
        seen = int(visible[b, t])
        n = -(-seen // size)
        keys = np.asarray(k[b, :seen], np.float32)
        for h in range(q.shape[2]) if method.per_head else (None,):
            scores = scores_of(q[b, t], keys, None, w[b, t]) if h is None else keys @ np.asarray(q[b, t, h], np.float32)
            best = np.pad(scores, (0, n * size - seen), constant_values=-np.inf).reshape(n, size).max(axis=1)
            best[n - method.keep_last :] = np.inf
            kept = np.asarray(out[b, t] if h is None else out[b, t, h])
            cut = np.sort(best)[::-1][min(m, n) - 1]
            kept = kept[kept >= 0]
            assert len(kept) == min(m, n) and (np.diff(kept) > 0).all()
            off = np.setxor1d(kept, np.flatnonzero(best >= cut))
            assert (np.abs(best[off] - cut) < TOKENS * scores.std()).all(), f"blocks {off} are far from the threshold"


def _row(
    name: str, model: shapes.Model, context: int, queries: int, make: Callable[[], Any], *, dtype: str = "bf16",
    implementation: str = "mosaic_gpu", flop: float = 0.0, moved_bytes: float = 0.0,
) -> Row:  # fmt: skip
    return Row(
        row=name, make=make, implementation=implementation, shape=model.name, context=context, queries=queries,
        dtype=dtype, flop=flop, moved_bytes=moved_bytes,
    )  # fmt: skip
