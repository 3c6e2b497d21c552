"""The rows of sparse grouped-query attention, beside cuDNN's dense attention over the same keys.

The dense side attends to the whole context without a mask: `is_causal` of fewer queries than keys aligns them at the
first key, so that the last queries of a context would see a few of its first keys. For the last 4096 queries of 128K
that is 1.6 % more than a causal mask at the right place would leave.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import hisa_jax as hj
from bench.gpu.inputs import BF16
from bench.gpu.row import K, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Heads, KV heads and their size; tokens a query attends to, and those of a block."""

    Hq: int
    G: int
    D: int
    topk: int = 2048
    block_size: int = 128

    def __str__(self) -> str:
        return f"{self.Hq}/{self.G}x{self.D}"


def rows() -> Iterator[Row]:
    for shape in (Shape(Hq=24, G=2, D=256), Shape(Hq=64, G=4, D=128)):
        for batch, T in ((1, 1), (32, 1), (128, 1), (1, 4096)):
            yield sparse(shape, batch, T, 128 * K, block_size=1)
            yield sparse(shape, batch, T, 128 * K, block_size=shape.block_size)
            yield dense(shape, batch, T, 128 * K)


def sparse(
    shape: Shape, batch: int, T: int, context: int, *, block_size: int, implementation: str = "triton"
) -> Row:  # fmt: skip
    """The last T queries, each group with a list of its own: tokens, or blocks, spread over what all queries see."""
    options: Any = dict(scale=shape.D**-0.5, block_size=block_size)

    def make():
        q, k, v = draw(shape, batch, T, context)
        n, n_blocks = shape.topk // block_size, (context - T) // block_size
        starts = jax.random.randint(jax.random.key(4), (batch, T, shape.G, 1), 0, n_blocks // n)
        ids = (starts + jnp.arange(n) * (n_blocks // n)).astype(jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(context - T, context, dtype=jnp.int32), (batch, T))

        def f(q: Array, k: Array, v: Array, positions: Array, ids: Array) -> Any:
            return hj.sparse_attention(
                q, k, v, ids, query_positions=positions, **options, implementation=implementation
            )

        def tokens_of(b: int, t: int, g: int) -> np.ndarray:
            return (np.asarray(ids[b, t, g])[:, None] * block_size + np.arange(block_size)).ravel()

        return f, (q, k, v, positions, ids), lambda out: check(out, q, k, v, tokens_of)

    # Decoding reads what is listed; many queries of a prefill read the whole context between them.
    n_read = batch * (shape.topk if T == 1 else context)
    return _row("tokens" if block_size == 1 else "blocks", shape, batch, T, context, shape.topk, n_read, make,
                implementation)  # fmt: skip


def dense(shape: Shape, batch: int, T: int, context: int, *, implementation: Any = "cudnn") -> Row:
    """The last T queries on all keys."""

    def make():
        q, k, v = draw(shape, batch, T, context)

        def f(q: Array, k: Array, v: Array, _: Array) -> Array:
            return jax.nn.dot_product_attention(q, k, v, scale=shape.D**-0.5, implementation=implementation)

        return f, (q, k, v, jnp.zeros((1,), jnp.int32)), lambda out: check(out, q, k, v, lambda *_: np.arange(context))

    return _row("dense", shape, batch, T, context, context, batch * context, make, str(implementation))


def _row(
    what: str, shape: Shape, batch: int, T: int, context: int, attended: int, n_read: int, make: Any,
    implementation: str,
) -> Row:  # fmt: skip
    n = batch * T
    return Row(
        row=f"attention_{what}_" + ("prefill" if T > 1 else f"decode{batch}"),
        make=make,
        implementation=implementation,
        shape=str(shape),
        context=context,
        queries=n,
        dtype="bf16",
        flop=4.0 * n * shape.Hq * attended * shape.D,
        moved_bytes=4.0 * (n * shape.Hq + n_read * shape.G) * shape.D,
    )


def draw(shape: Shape, batch: int, T: int, context: int) -> tuple[Array, Array, Array]:
    """[B, T, Hq, D], [B, S, G, D], [B, S, G, D], a sequence at a time: of 128 the random bits alone fill a card."""

    def sequences(seed: int, *shape: int) -> Array:
        keys = jax.random.split(jax.random.key(seed), batch)
        return jax.jit(lambda keys: lax.map(lambda key: jax.random.normal(key, shape, BF16), keys))(keys)

    k, v = (sequences(seed, context, shape.G, shape.D) for seed in (1, 2))
    return sequences(0, T, shape.Hq, shape.D), k, v


def check(out: Any, q: Array, k: Array, v: Array, tokens_of: Any) -> None:
    """The first and the last query of the first and the last sequence, all heads."""
    (B, T, Hq, D), G = q.shape, k.shape[2]
    for b, t, g in {(b, t, g) for b in (0, B - 1) for t in (0, T - 1) for g in range(G)}:
        heads, tokens = slice(g * Hq // G, (g + 1) * Hq // G), tokens_of(b, t, g)
        keys, values = (np.asarray(x[b, tokens, g], np.float32) for x in (k, v))
        logits = D**-0.5 * np.asarray(q[b, t, heads], np.float32) @ keys.T
        p = np.exp(logits - logits.max(1, keepdims=True))
        wanted = p / p.sum(1, keepdims=True) @ values
        assert np.linalg.norm(np.asarray(out[b, t, heads], np.float32) - wanted) < 2e-2 * np.linalg.norm(wanted)
