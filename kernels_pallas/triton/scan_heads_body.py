"""Device code of `scan_heads`: one query a program, first for its slopes."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.scan_samples import N_BEST, N_SAMPLES, shift_of_samples
from hisa_jax.kernels_pallas.sort_key import INVISIBLE, sort_key_of
from hisa_jax.kernels_pallas.triton.scan_body import rows_of
from hisa_jax.kernels_pallas.triton.topk_body import choose
from hisa_jax.kernels_pallas.types import Ref
from hisa_jax.xla.means import split


class HeadInputs(NamedTuple):
    """A query's rows."""

    q: Ref  # [H, D]
    w: Ref  # [H]
    slopes: Ref | None  # [H]; None: from samples, or without these 1
    samples: "SlopeInputs | None"


class Layout(NamedTuple):
    """Where sampled keys are: `page_size`, None in one piece; `is_sample`, whether there are no others between them."""

    page_size: int | None = None
    is_sample: bool = False


class SlopeInputs(NamedTuple):
    """A query's rows of most arrays; keys, table and scales whole."""

    q: Ref  # [H, D]
    w: Ref  # [H]
    visible: Ref  # [1]
    first: Ref  # [1], row of its sequence's first key, or sample
    k: Ref  # [S, D]
    table: Ref | None  # [n], for keys in pages
    k_scale: Ref | None  # [S]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    n_exact: int
    n_linear: int  # rows of the virtual head
    layout: "Layout"


def scan_heads_body(refs: HeadInputs, o_q_ref: Ref, o_w_ref: Ref, *, plan: Plan) -> None:
    # One program, one query:   the heads that are not exact, summed with weights and slopes -> rows o_q, weights o_w
    #
    # The arithmetic is that of xla/scan.py. out: [R, D], [R].
    R, D = o_q_ref.shape
    heads, w = refs.q[...], refs.w[...]
    q = heads.astype(jnp.float32)
    is_exact, slot = _exact_heads(q, w, plan.n_exact)
    if refs.samples is not None:
        slopes = _slopes(refs.samples, plan.layout)
    else:
        slopes = jnp.ones_like(w) if refs.slopes is None else refs.slopes[...]
    # Neither weight nor query of an exact head: 0 times infinity is NaN.
    weights = jnp.where(is_exact, 0.0, w * slopes)
    v = jnp.sum(weights[:, None] * jnp.where(is_exact[:, None], 0.0, q), axis=0)
    v = v.astype(jnp.bfloat16).astype(jnp.float32)
    if plan.n_linear > 1:
        # Infinity is no e4m3; the products of one with keys of both signs are NaN.
        v = jnp.where(jnp.abs(v) < jnp.inf, v, jnp.nan)
    parts, scale = split(v, plan.n_linear, o_q_ref.dtype, step=16.0)
    for i, part in enumerate(parts):
        o_q_ref[i] = part
        o_w_ref[i] = jnp.float32(1.0) if scale is None else scale * 16.0**-i
    rows, columns = jnp.arange(R, dtype=jnp.int32), jnp.arange(D, dtype=jnp.int32)
    if plan.n_exact:
        row = plan.n_linear + slot
        mask = jnp.broadcast_to(is_exact[:, None], heads.shape)
        plt.store(o_q_ref.at[row[:, None], columns[None, :]], heads, mask=mask)
        plt.store(o_w_ref.at[row], w, mask=is_exact)
    is_empty = rows >= plan.n_linear + plan.n_exact
    none = jnp.zeros((R, D), jnp.float32).astype(o_q_ref.dtype)
    plt.store(o_q_ref.at[rows[:, None], columns[None, :]], none, mask=jnp.broadcast_to(is_empty[:, None], (R, D)))
    plt.store(o_w_ref.at[rows], jnp.zeros((R,), jnp.float32), mask=is_empty)


def _exact_heads(q: Array, w: Array, n: int) -> tuple[Array, Array]:
    """[H, D], [H] -> [H] bool, the n heads of greatest |w| * |q|, a tie to the lower; [H] int32, the slot of each."""
    H = w.shape[0]
    if n == 0:
        return jnp.zeros((H,), jnp.bool_), jnp.zeros((H,), jnp.int32)
    size = sort_key_of(jnp.abs(w) * jnp.sqrt(jnp.sum(q * q, axis=1)))
    head = jnp.arange(H, dtype=jnp.int32)
    is_ahead = (size[None, :] > size[:, None]) | ((size[None, :] == size[:, None]) & (head[None, :] < head[:, None]))
    is_exact = jnp.sum(is_ahead.astype(jnp.int32), axis=1) < n
    # A head that is not exact has the next one's slot: interpret mode writes there, before its owner does.
    return is_exact, jnp.cumsum(is_exact.astype(jnp.int32)) - is_exact.astype(jnp.int32)


def slopes_body(refs: SlopeInputs, o_ref: Ref, *, layout: Layout) -> None:
    # One program, one query:   sampled keys x heads -> their scores, the 32 best -> how often each head is open there
    #
    # out: [H].
    o_ref[...] = _slopes(refs, layout)


def _slopes(refs: SlopeInputs, layout: Layout) -> Array:
    """[H] float32. The products [256, H] stay in registers from the scores to the counts."""
    heads, w = refs.q[...], refs.w[...]
    visible, columns = refs.visible[0], jnp.arange(refs.k.shape[1], dtype=jnp.int32)
    sample = jnp.arange(N_SAMPLES, dtype=jnp.int32)
    positions = sample << shift_of_samples(visible)
    there = positions < visible
    places = jnp.where(there, sample if layout.is_sample else positions, 0)
    rows = rows_of(refs.k, refs.table, refs.first[0] + places, layout.page_size)
    k = plt.load(refs.k.at[rows[:, None], columns[None, :]])
    products = lax.dot_general(k, heads, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    score = jnp.sum(jnp.where(products < 0.0, 0.0, products) * w[None, :], axis=1)
    if refs.k_scale is not None:
        score = score * plt.load(refs.k_scale.at[rows])
    is_best, _, n_best = choose(jnp.where(there, sort_key_of(score), INVISIBLE), N_BEST)
    is_open = (products > 0.0) & is_best[:, None]
    n_open = jnp.sum(is_open.astype(jnp.int32), axis=0)
    return n_open.astype(jnp.float32) / jnp.maximum(n_best, 1).astype(jnp.float32)
