"""The heads that a scan's TPU kernel finds: interpreted, against those of the plain scan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.kernels_pallas.mosaic_tpu.scan_heads import heads_of_rows, scan_heads
from hisa_jax.layout import Call, Keys, Queries
from hisa_jax.xla import scan
from tests.gpu import draw

BF16, INT8 = jnp.bfloat16, jnp.int8
SMALL = hj.Scan(topk=24, candidates=48, exact_heads=3, unit=4)


def heads_of(method, visible, interpret):
    """(q, k, k_scale, w) -> the heads by the kernel, and by XLA sequence by sequence."""

    def call_of(q, k, k_scale, w):
        lengths = jnp.full(k.shape[:1], k.shape[1], jnp.int32)
        return Call(q=q, w=w, visible=jnp.asarray(visible, jnp.int32), k=Keys(k, k_scale), lengths=lengths)

    @jax.jit
    def plain(*inputs):
        call = call_of(*inputs)
        rows = [Queries(*(x[b] for x in (call.q, call.w, call.visible))) for b in range(call.shape[0])]
        found = [scan.heads_of(x, call.sequence(jnp.int32(b)), method) for b, x in enumerate(rows)]
        return jax.tree.map(lambda *x: jnp.stack(x), *found)

    kernel = jax.jit(lambda *inputs: scan_heads(call_of(*inputs), method, interpret))
    return lambda inputs: (kernel(*inputs), plain(*inputs))


def check(found, visible):
    """Of queries that see something: the same exact heads, and a virtual one that is as near as float32 sums are."""
    sees = np.asarray(visible) > 0
    got, wanted = (jax.tree.map(lambda x: np.asarray(x, np.float32)[sees], heads) for heads in found)
    np.testing.assert_array_equal(got.exact, wanted.exact)
    np.testing.assert_array_equal(got.w, wanted.w)
    finite = wanted.virtual[np.isfinite(wanted.virtual)]
    np.testing.assert_allclose(got.virtual, wanted.virtual, rtol=0, atol=2e-6 * np.abs(finite).max())


@pytest.mark.slow
def test_heads_are_those_of_the_plain_scan(interpret):
    """And stay so beside a query that is not finite, whose neighbours are computed one by one then.

    12 s: no sample, fewer than are best, all of them, and one step after another; equal scores and equal sizes.
    """
    visible = [[0, 1, 3, 40, 255, 257, 698, 700, 700]]
    run = heads_of(SMALL, visible, interpret)
    integers, normal = (x(0, 1, 9, 700, 16, 128, BF16, False) for x in (draw.integers, draw.normal))
    check(run(integers), visible)
    q, k, _, w = normal
    q = q.at[0, 2, 5, 3].set(jnp.inf).at[0, 3, 1, 1].set(jnp.nan)
    check(run((q, k.at[0, 8].set(jnp.inf), None, w.at[0, 5, 2].set(jnp.inf))), visible)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("changes", "B", "T", "S", "H", "dtype"),
    [
        pytest.param({}, 2, 130, 1500, 16, BF16, id="two_tiles_of_two_halves"),
        pytest.param({}, 1, 64, 600, 64, BF16, id="heads_of_a_real_model"),
        pytest.param({}, 1, 8, 600, 128, BF16, id="most_heads"),
        pytest.param(dict(exact_heads=0), 1, 8, 300, 16, BF16, id="virtual_head_alone"),
        pytest.param(dict(exact_heads=99), 1, 8, 300, 16, BF16, id="all_heads_exact"),
        pytest.param(dict(slopes="plain"), 1, 20, 300, 32, BF16, id="slopes_of_one"),
        pytest.param({}, 1, 16, 600, 16, INT8, id="8_bits_and_scales"),
    ],
)
def test_heads_of_other_shapes_too(interpret, changes, B, T, S, H, dtype):
    method = hj.Scan(**(dict(topk=24, candidates=48, exact_heads=3, unit=4) | changes))
    visible = np.random.default_rng(1).integers(0, S + 1, (B, T))
    inputs = draw.integers(2, B, T, S, H, 128, dtype, dtype == INT8)
    check(heads_of(method, visible, interpret)(inputs), visible)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "order", [pytest.param([1, 2, 1, 0, 2], id="rows_of_few_sequences"), pytest.param([2], id="one")]
)
def test_rows_of_queries_see_the_keys_of_their_sequence(interpret, order):
    """As those of ragged tiles do, more or fewer than there are sequences."""
    q, k, _, w = draw.integers(3, 3, 8, 600, 16, 128, BF16, False)
    visible = np.random.default_rng(2).integers(1, 601, (3, 8))
    lengths = jnp.full(3, 600, jnp.int32)
    call = Call(q=q, w=w, visible=jnp.asarray(visible, jnp.int32), k=Keys(k, None), lengths=lengths)
    of_each = [
        scan.heads_of(Queries(q[r], w[r], call.visible[r]), call.sequence(jnp.int32(r)), SMALL) for r in range(3)
    ]
    wanted = jax.tree.map(lambda *x: jnp.stack(x)[jnp.asarray(order)], *of_each)
    sequences = jnp.asarray(order, jnp.int32)
    queries = Queries(*(x[sequences] for x in (call.q, call.w, call.visible)))
    got = jax.jit(lambda *x: heads_of_rows(*x, call, 600, SMALL, interpret))(queries, sequences)
    check((got, wanted), visible[order])
