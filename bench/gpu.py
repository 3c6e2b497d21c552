"""`python -m bench gpu`: every stage and whole indexer on an NVIDIA GPU, each result checked before it is timed.

Time is device time of many repetitions inside one jitted loop, where each repetition waits for the one before (one of
its inputs depends on the last result); a sample is the wall clock of such a program over its repetitions, a figure
the median of the samples. Everything is counted: top-k, index arithmetic, launches. Floors are those of the tensor
cores at the vendor's dense rate, or of device memory where that is the larger.
"""

import argparse
import dataclasses
import fnmatch
import json
import pathlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from bench import shapes
from kernels_pallas import mosaic_gpu, triton
from kernels_pallas.flatten import tokens_present
from kernels_pallas.mosaic_gpu import refine as mosaic_refine
from kernels_pallas.mosaic_gpu import topk as mosaic_topk
from kernels_pallas.triton.pool import pool
from kernels_pallas.triton.sparse_mla import sparse_mla

E4M3, BF16 = jnp.float8_e4m3fn, jnp.bfloat16
TENSOR_FLOPS = {"e4m3": 1979e12, "bf16": 990e12}  # vendor's dense figures, H100 SXM and H200
MEMORY_BYTES = 4.3e12  # a second, measured by a copy on an H200
SAMPLE_S = 0.02
_CHECKED = 6  # queries whose results are compared with NumPy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        make: () -> (f, its operands, check of its result that raises; the last operand is int32 and may be delayed).
        flop: arithmetic of the visible work; `moved_bytes`: what must cross device memory.
    """

    row: str
    implementation: str
    shape: str
    context: int
    queries: int
    dtype: str
    make: Callable
    flop: float = 0.0
    moved_bytes: float = 0.0

    @property
    def floor_ms(self) -> float:
        return 1e3 * max(self.flop / TENSOR_FLOPS[self.dtype], self.moved_bytes / MEMORY_BYTES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=pathlib.Path, help="write the rows to this file")
    parser.add_argument("--rows", default="*", help="only rows whose name matches this pattern")
    parser.add_argument("--samples", type=int, default=9, help="timed programs a row")


def run(args: argparse.Namespace) -> int:
    if jax.default_backend() != "gpu":
        print(
            f"python -m bench gpu: error: needs an NVIDIA GPU, this machine has {jax.default_backend()}",
            file=sys.stderr,
        )
        return 2
    warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")
    results, failed = [], 0
    for row in rows():
        if not fnmatch.fnmatch(row.row, args.rows):
            continue
        try:
            results.append(_measure(row, args.samples))
            print(_line(results[-1]), flush=True)
        except Exception as error:  # a row that fails must not cost the others; the exit status tells
            failed += 1
            print(f"{row.row} {row.implementation} {row.context}: FAILED {error!r:.300}", flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if failed else 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


def rows() -> Iterator[Row]:
    """All rows, the ones that matter most first."""
    dsv32, glm5, K = shapes.DSV32, shapes.GLM5, 1024
    yield _hisa("hisa", dsv32, 64 * K, E4M3)
    for context in (8 * K, 16 * K, 32 * K, 128 * K, 256 * K, 1024 * K):
        yield _hisa("hisa", dsv32, context, E4M3)
    yield _hisa("hisa", glm5, 64 * K, E4M3)
    yield _hisa("hisa", dsv32, 64 * K, BF16)
    yield _hisa("hisa_clustered", dsv32, 64 * K, E4M3, clustered=True)
    yield _refine_scores(dsv32, 64 * K)
    yield _topk(8192, dsv32.topk)
    yield _pool_and_filter(dsv32, 64 * K)
    for context in (8 * K, 16 * K, 32 * K, 64 * K, 128 * K):
        yield _flat("flat", dsv32, context, E4M3)
    for batch in (1, 32, 128):
        yield _decode(dsv32, batch, 128 * K)
    yield _hisa("hisa", dsv32, 64 * K, BF16, module=triton)
    yield _hisa("hisa", dsv32, 64 * K, E4M3, module=triton)
    yield _sparse_mla(dsv32, 1, 4096, 64 * K)
    for batch in (1, 32, 128):
        yield _sparse_mla(dsv32, batch, 1, 8 * K)


def _hisa(
    name: str, model: shapes.Model, context: int, dtype: DTypeLike, *, module: Any = mosaic_gpu, clustered: bool = False
) -> Row:
    T = min(4096, context)
    options = {"topk": model.topk, "block_size": model.block_size, "block_topk": model.block_topk}

    def make():
        q, k, k_scale, w, visible = _inputs(model, 1, T, context, dtype, clustered)
        f = lambda *x: module.select_hisa(*x, **options)  # noqa: E731
        return f, (q, k, k_scale, w, visible), lambda out: _check_hisa(out, q, k, k_scale, w, visible, model)

    kept = min(model.block_topk * model.block_size, context)
    pairs = T * (kept + (context / model.block_size if kept < context else 0))
    return Row(
        row=name,
        implementation=module.__name__.rsplit(".", 1)[-1],
        shape=model.name,
        context=context,
        queries=T,
        dtype=_name(dtype),
        make=make,
        flop=2.0 * pairs * model.H * model.D,
    )


def _refine_scores(model: shapes.Model, context: int) -> Row:
    T, m, B = 4096, model.block_topk, model.block_size

    def make():
        q, k, k_scale, w, visible = _inputs(model, 1, T, context, E4M3, False)
        blocks = jnp.sort(lax.top_k(jax.random.uniform(jax.random.key(1), (T, context // B)), m)[1], axis=1)
        config = mosaic_refine.Config()

        def f(q, k, k_scale, w, blocks, visible):
            return mosaic_refine.refine_scores(
                q,
                w,
                k,
                k_scale,
                blocks,
                visible,
                jnp.zeros_like(visible),
                block_size=B,
                config=config,
                n_ctas=mosaic_gpu.n_sms(),
            )

        operands = (q[0], k[0], k_scale[0], w[0], blocks.astype(jnp.int32), visible[0])

        def check(images: Any) -> None:
            for t in range(_CHECKED):
                tokens = (np.asarray(blocks[t])[:, None] * B + np.arange(B)).ravel()
                seen = tokens < int(visible[0, t])
                want = _scores(q[0, t], k[0, tokens], k_scale[0, tokens], w[0, t])
                bits = np.asarray(images[t])
                got = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(np.float32)
                assert np.abs(got - want)[seen].max() < 2e-3 * want.std()

        return f, operands, check

    return Row(
        row="refine_scores",
        implementation="mosaic_gpu",
        shape=model.name,
        context=context,
        queries=T,
        dtype="e4m3",
        make=make,
        flop=2.0 * T * m * B * model.H * model.D,
    )


def _topk(width: int, k: int) -> Row:
    T = 4096

    def make():
        x = jax.lax.bitcast_convert_type(jax.random.normal(jax.random.key(2), (T, width)), jnp.int32)
        x = jnp.where(x < 0, x ^ 0x7FFFFFFF, x)
        limit = jnp.full((T,), width, jnp.int32)

        def check(out: Any) -> None:
            for t in range(_CHECKED):
                want = np.sort(np.argsort(-np.asarray(x[t]).astype(np.int64), kind="stable")[:k])
                np.testing.assert_array_equal(out[0][t], want)

        return lambda x, limit: mosaic_topk.topk(x, limit, k, n_ctas=mosaic_gpu.n_sms()), (x, limit), check

    return Row(
        row="topk",
        implementation="mosaic_gpu",
        shape=f"{width}_to_{k}",
        context=width,
        queries=T,
        dtype="e4m3",
        make=make,
        moved_bytes=4.0 * T * (width + k),
    )


def _pool_and_filter(model: shapes.Model, context: int) -> Row:
    T, B = 4096, model.block_size

    def make():
        q, k, k_scale, w, visible = _inputs(model, 1, T, context, E4M3, False)

        def f(q, k, k_scale, w, visible):
            means = pool(k, k_scale, tokens_present(None, 1, context, B), block_size=B)
            return mosaic_gpu.select.block_filter(
                q,
                w,
                means[0],
                means[1],
                visible,
                n_sequences=1,
                block_size=B,
                block_topk=model.block_topk,
                keep_first=1,
                keep_last=1,
                n_ctas=mosaic_gpu.n_sms(),
            )

        def check(blocks: Any) -> None:
            means = _means(k[0], k_scale[0], B)
            for t in range(_CHECKED):
                _check_blocks(np.asarray(blocks[t]), _scores(q[0, t], means, None, w[0, t]), int(visible[0, t]), model)

        return f, (q[0], k[0], k_scale[0], w[0], visible[0]), check

    return Row(
        row="pool_and_block_filter",
        implementation="mosaic_gpu",
        shape=model.name,
        context=context,
        queries=T,
        dtype="e4m3",
        make=make,
        flop=2.0 * T * (context / B) * model.H * model.D,
        moved_bytes=context * (model.D + 4.0) + T * model.H * (model.D + 4.0),
    )


def _flat(name: str, model: shapes.Model, context: int, dtype: DTypeLike) -> Row:
    T = min(4096, context)

    def make():
        q, k, k_scale, w, visible = _inputs(model, 1, T, context, dtype, False)

        def check(out: Any) -> None:
            for t in range(0, T, T // _CHECKED):
                scores = _scores(q[0, t], k[0, : int(visible[0, t])], k_scale[0, : int(visible[0, t])], w[0, t])
                _check_tokens(out[0][0, t], out[1][0, t], scores, np.arange(len(scores)), model.topk)

        return lambda *x: mosaic_gpu.select_flat(*x, topk=model.topk), (q, k, k_scale, w, visible), check

    return Row(
        row=name,
        implementation="mosaic_gpu",
        shape=model.name,
        context=context,
        queries=T,
        dtype=_name(dtype),
        make=make,
        flop=2.0 * T * context * model.H * model.D,
    )


def _decode(model: shapes.Model, batch: int, context: int) -> Row:
    """One query a sequence; block means are kept, as a server keeps them."""
    B = model.block_size

    def make():
        q, k, k_scale, w, visible = _inputs(model, batch, 1, context, E4M3, False)
        counts = tokens_present(None, batch, context, B)
        means = jax.jit(lambda k, s: pool(k, s, counts, block_size=B))(k.reshape(-1, model.D), k_scale.reshape(-1))

        def f(q, k, k_scale, w, means, visible):
            return mosaic_gpu.select.hisa(
                q,
                w,
                k,
                k_scale,
                visible,
                counts,
                n_sequences=batch,
                topk=model.topk,
                block_size=B,
                block_topk=model.block_topk,
                keep_first=1,
                keep_last=1,
                n_ctas=mosaic_gpu.n_sms(),
                means=means,
            )

        flat = (q[:, 0], k.reshape(-1, model.D), k_scale.reshape(-1), w[:, 0], means, visible[:, 0])
        check = lambda out: _check_hisa([x[:1, None] for x in out], q, k, k_scale, w, visible, model)  # noqa: E731
        return f, flat, check

    pairs = batch * (model.block_topk * B + context / B)
    return Row(
        row=f"decode{batch}",
        implementation="mosaic_gpu",
        shape=model.name,
        context=context,
        queries=batch,
        dtype="e4m3",
        make=make,
        flop=2.0 * pairs * model.H * model.D,
        moved_bytes=pairs * (model.D + 4.0),
    )


def _sparse_mla(model: shapes.Model, batch: int, T: int, context: int) -> Row:
    N, E, V, K = model.mla_heads, model.mla_dim, model.mla_value_dim, model.topk

    def make():
        keys = jax.random.split(jax.random.key(3), 3)
        q = jax.random.normal(keys[0], (batch, T, N, E), BF16)
        kv = jax.random.normal(keys[1], (batch, context, E), BF16)
        starts = jax.random.randint(keys[2], (batch, T, 1), 0, context // K)
        indices = (starts + jnp.arange(K) * (context // K)).astype(jnp.int32)

        def check(out: Any) -> None:
            rows = np.asarray(kv[0, indices[0, 0]], np.float32)
            logits = E**-0.5 * np.asarray(q[0, 0], np.float32) @ rows.T
            p = np.exp(logits - logits.max(1, keepdims=True))
            want = p / p.sum(1, keepdims=True) @ rows[:, :V]
            assert np.linalg.norm(np.asarray(out[0][0, 0], np.float32) - want) < 1e-2 * np.linalg.norm(want)

        return lambda q, kv, x: sparse_mla(q, kv, x, value_dim=V, scale=E**-0.5), (q, kv, indices), check

    n = batch * T
    return Row(
        row="sparse_mla" if T > 1 else f"sparse_mla_decode{batch}",
        implementation="triton",
        shape=model.name,
        context=context,
        queries=n,
        dtype="bf16",
        make=make,
        flop=2.0 * n * N * K * (E + V),
        moved_bytes=2.0 * (n * N * (E + V) + (n * K * E if T == 1 else context * E)),
    )


def _inputs(model: shapes.Model, B: int, T: int, S: int, dtype: DTypeLike, clustered: bool) -> Any:
    """q, k, k_scale (None for bfloat16), w, visible: the last T queries of S tokens; normal, or around topics."""
    keys = jax.random.split(jax.random.key(0), 6)
    q = jax.random.normal(keys[0], (B, T, model.H, model.D))
    k = jax.random.normal(keys[1], (B, S, model.D))
    if clustered:
        # Passages of 512 tokens share a topic, queries of a passage ask for a few topics: neighbours keep like blocks.
        topics = 2 * jax.random.normal(keys[4], (S // 512, model.D))
        k = k + jnp.repeat(topics, 512, axis=0)
        asked = jax.random.randint(keys[5], (T // 512 + 1, model.H), 0, S // 512)
        q = q + 0.5 * topics[jnp.repeat(asked, 512, axis=0)[:T]]
    w = 0.01 * jax.random.normal(keys[2], (B, T, model.H))
    k_scale = jnp.exp(0.1 * jax.random.normal(keys[3], (B, S))) if dtype == E4M3 else None
    visible = jnp.broadcast_to(jnp.arange(S - T + 1, S + 1, dtype=jnp.int32), (B, T))
    return q.astype(dtype), k.astype(dtype), k_scale, w, visible


def _measure(row: Row, samples: int) -> dict:
    f, operands, check = row.make()
    check(jax.tree.map(np.asarray, jax.jit(f)(*operands)))

    @jax.jit
    def repeat(n: int, *operands: Any) -> Any:
        def again(_, carry):
            last, _ = carry
            result = jax.tree.leaves(f(*operands[:-1], last))[0]
            # Nothing changes, but the compiler cannot know: the next repetition waits for this one.
            return jnp.where(result.reshape(-1)[0] == -7, last + 1, last), result.reshape(-1)[0].astype(jnp.float32)

        return lax.fori_loop(0, n, again, (operands[-1], jnp.float32(0)))[1]

    def sample(n: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(repeat(n, *operands))
        return (time.perf_counter() - start) / n * 1e3

    sample(1)
    n = max(int(SAMPLE_S * 1e3 / sample(5)), 3)
    times = [sample(n) for _ in range(samples)]
    ms = float(np.median(times))
    p10, p90 = (float(x) for x in np.percentile(times, [10, 90]))
    return {
        **{name: getattr(row, name) for name in ("row", "implementation", "shape", "context", "queries", "dtype")},
        "ms": ms,
        "ms_p10": p10,
        "ms_p90": p90,
        "tflops": row.flop / ms / 1e9,
        "floor_ms": row.floor_ms,
        "checked": True,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _line(x: dict) -> str:
    floor = f"{100 * x['floor_ms'] / x['ms']:3.0f} % of floor"
    what = f"{x['row']:22} {x['implementation']:10} {x['shape']:12} {shapes.label(x['context']):>5} {x['dtype']:5}"
    return f"{what} {x['ms']:8.4f} ms [{x['ms_p10']:.4f}, {x['ms_p90']:.4f}] {x['tflops']:6.0f} TFLOP/s  {floor}"


def _scores(q: Array, k: Array | np.ndarray, k_scale: Array | None, w: Array) -> np.ndarray:
    """[H, D], [s, D], [s] or None, [H] -> [s] float32."""
    products = np.maximum(np.asarray(k, np.float32) @ np.asarray(q, np.float32).T, 0) @ np.asarray(w, np.float32)
    return products if k_scale is None else products * np.asarray(k_scale)


def _means(k: Array, k_scale: Array | None, block_size: int) -> np.ndarray:
    values = k.astype(jnp.float32) if k_scale is None else k.astype(jnp.float32) * k_scale[:, None]
    return np.asarray(values.reshape(-1, block_size, k.shape[1]).mean(1))


def _check_hisa(
    out: Any, q: Array, k: Array, k_scale: Array | None, w: Array, visible: Array, model: shapes.Model
) -> None:
    indices, count, blocks = out
    scale = None if k_scale is None else k_scale[0]
    means = _means(k[0], scale, model.block_size)
    T = q.shape[1]
    for t in range(0, T, max(T // _CHECKED, 1)):
        seen = int(visible[0, t])
        kept = np.asarray(blocks[0, t])[np.asarray(blocks[0, t]) >= 0]
        _check_blocks(kept, _scores(q[0, t], means, None, w[0, t]), seen, model)
        tokens = (kept[:, None] * model.block_size + np.arange(model.block_size)).ravel()
        tokens = tokens[tokens < seen]
        scores = _scores(q[0, t], k[0, tokens], None if scale is None else scale[tokens], w[0, t])
        _check_tokens(indices[0, t], count[0, t], scores, tokens, model.topk)


def _check_blocks(kept: np.ndarray, scores: np.ndarray, visible: int, model: shapes.Model) -> None:
    n, m = -(-visible // model.block_size), model.block_topk
    assert len(kept) == min(n, m) and (np.diff(kept) > 0).all() and kept[0] == 0 and kept[-1] == n - 1
    if n > m:
        inner = scores[1 : n - 1]
        cut = np.sort(inner)[::-1][m - 3]
        off = np.setxor1d(kept[1:-1] - 1, np.flatnonzero(inner >= cut))
        assert (np.abs(inner[off] - cut) < 2e-2 * inner.std()).all()


def _check_tokens(indices: Any, count: Any, scores: np.ndarray, tokens: np.ndarray, topk: int) -> None:
    k = min(topk, len(tokens))
    chosen = np.asarray(indices)
    assert int(count) == k and (chosen[k:] == -1).all() and (np.diff(chosen[:k]) > 0).all()
    assert np.isin(chosen[:k], tokens).all()
    cut = np.sort(scores)[::-1][k - 1]
    off = np.setxor1d(chosen[:k], tokens[scores >= cut])
    assert (np.abs(scores[np.searchsorted(tokens, off)] - cut) < 2e-3 * scores.std()).all()


def _name(dtype: DTypeLike) -> str:
    return "e4m3" if dtype == E4M3 else "bf16"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
