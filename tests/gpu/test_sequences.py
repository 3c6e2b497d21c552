"""Where the rows of batches and packed batches lie, worked out when tracing or when running."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax.kernels_pallas.flat_call import flatten
from hisa_jax.kernels_pallas.sequences import Sequences
from tests import kernel_calls

RAGGED = Sequences(
    query_starts=np.array([0, 3, 3, 10], np.int32),
    key_starts=np.array([0, 24, 32], np.int32),
    lengths=np.array([21, 5, 40], np.int32),
    max_keys=40,
)


def traced(f, sequences):
    """f(sequences) under jit, with everything but the bound unknown."""
    arrays = {x.name: getattr(sequences, x.name) for x in dataclasses.fields(sequences) if x.name != "max_keys"}
    return jax.jit(lambda a: f(Sequences(**a, max_keys=sequences.max_keys)))(jax.tree.map(jnp.asarray, arrays))


def test_query_tiles_cover_every_query_once_within_its_sequence():
    limit = jnp.arange(12, dtype=jnp.int32)
    for tiles in (
        RAGGED.query_tiles(12, 4, limit, 8),
        traced(lambda s: s.query_tiles(12, 4, limit, 8), RAGGED),
    ):
        tiles = np.asarray(tiles)
        tiles = tiles[tiles[:, 1] > 0]
        np.testing.assert_array_equal(tiles, [[0, 3, 0, 8], [3, 4, 32, 8], [7, 3, 32, 16]])


def test_rows_know_their_sequence():
    wanted = [0, 0, 0, 32, 32, 32, 32, 32, 32, 32]
    np.testing.assert_array_equal(RAGGED.key_start_of_queries(10), wanted)
    np.testing.assert_array_equal(traced(lambda s: s.key_start_of_queries(10), RAGGED), wanted)


def test_some_queries_of_one_sequence_are_known_when_tracing():
    one = dataclasses.replace(RAGGED, query_starts=np.array([0, 10]), key_starts=np.array([0]), lengths=np.array([40]))
    assert isinstance(one.from_query(jnp.int32(8), 4).of_queries(4), np.ndarray)
    own = RAGGED.from_query(jnp.int32(2), 4)
    np.testing.assert_array_equal(own.query_starts, [0, 1, 1, 4])
    np.testing.assert_array_equal(own.key_start_of_queries(4), [0, 32, 32, 32])


def test_tokens_in_blocks_end_with_the_sequence():
    wanted = [8, 8, 5, 5, 8, 8, 8, 8, 8, 0]
    np.testing.assert_array_equal(RAGGED.tokens_in_blocks(80, 8), wanted)
    np.testing.assert_array_equal(traced(lambda s: s.tokens_in_blocks(80, 8), RAGGED), wanted)


@pytest.mark.parametrize("align", [1, 8, 32])
def test_a_packed_batch_is_moved_to_aligned_rows(align):
    lengths = np.array([20, 0, 33, 7])
    cu_k = jnp.asarray(np.concatenate([[0], np.cumsum(lengths)]), jnp.int32)
    k = jnp.arange(70, dtype=jnp.float32)[:, None] + jnp.zeros((1, 4))
    q, w, visible = jnp.zeros((4, 2, 4)), jnp.zeros((4, 2)), jnp.zeros(4, jnp.int32)
    cu_seqlens = jnp.array([0, 1, 2, 3, 4], jnp.int32), cu_k
    call = flatten(kernel_calls.call_of(q, k, k[:, 0], w, visible, cu_seqlens=cu_seqlens), align)
    starts = np.asarray(call.sequences.key_starts)
    assert (starts % align == 0).all()
    for r in np.flatnonzero(lengths):
        there = slice(starts[r], starts[r] + lengths[r])
        np.testing.assert_array_equal(call.k[there, 0], np.arange(cu_k[r], cu_k[r + 1]))
        np.testing.assert_array_equal(call.k_scale[there], np.arange(cu_k[r], cu_k[r + 1]))


def test_a_batch_costs_nothing_to_find_its_rows():
    q, k = jnp.zeros((2, 3, 2, 4)), jnp.zeros((2, 13, 4))
    call = flatten(kernel_calls.call_of(q, k, None, jnp.zeros((2, 3, 2)), jnp.zeros((2, 3), jnp.int32)), 8)
    assert call.k.shape == (32, 4) and isinstance(call.sequences.key_starts, np.ndarray)
    assert call.sequences.aligned(32, 16)[0] is None
    blocks = call.sequences.blocks(8)
    np.testing.assert_array_equal(blocks.key_starts, [0, 2])
    rows, aligned = blocks.aligned(4, 8)
    np.testing.assert_array_equal(aligned.key_starts, [0, 8])
    np.testing.assert_array_equal(rows[:2], [0, 1])
    np.testing.assert_array_equal(rows[8:10], [2, 3])


def test_some_queries_at_a_time_is_all_at_once():
    q = jnp.arange(2 * 5, dtype=jnp.float32).reshape(2, 5, 1, 1)
    call = flatten(kernel_calls.call_of(q, jnp.zeros((2, 8, 1)), None, q[..., 0], jnp.ones((2, 5), jnp.int32)), 8)

    def f(call):
        T = call.q.shape[0]
        return call.q[:, 0, 0] + call.sequences.key_start_of_queries(T), call.visible

    for size in (3, 4, 10):
        for got, wanted in zip(call.map_queries(f, size), f(call), strict=True):
            np.testing.assert_array_equal(got, wanted)
