"""The scores kernel: sort keys, forced candidates, filter and masks; and the loop of PTX that no interpreter runs."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax.kernels_pallas import mosaic_gpu
from hisa_jax.kernels_pallas.mosaic_gpu import scores as scores_stage
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.gather_keys import copy_ptx
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.list_bits import list_ptx
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.score_loop_text import loop_ptx
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.score_shape import Shape
from hisa_jax.kernels_pallas.operands import Columns, Operands
from hisa_jax.kernels_pallas.pages import Pages
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE
from tests.gpu import draw, reference

E4M3, BF16 = jnp.float8_e4m3fn, jnp.bfloat16


def skip_unless_hopper(H, D, dtype):
    if jax.default_backend() != "gpu" or mosaic_gpu.why_not(jax.devices()[0].compute_capability, H, D, dtype, topk=64):
        pytest.skip("needs a Hopper GPU")


def check(H, D, dtype, n_parts, n_score, threshold, interpret, keep=1, n_ctas=132, maxima_of=0, n_keys=1):
    """Three queries of 600 keys, tiles of two queries, limits inside a tile of keys; sums are exact."""
    T, S = 3, 600
    q, k, scale, w = draw.integers(H + D, 1, T, S, H, D, dtype, dtype == E4M3)
    k = jnp.concatenate([k, k])[:n_parts]  # a part twice is a key twice as large
    together = 2 if H == 32 else 1
    # The third sees nothing, and nothing is written; of two that share a product it has a slot by itself.
    limit = np.asarray([600, 131, 0 if together == 1 else 100], np.int32)
    tiles = np.asarray([[0, 2, 0, 1024], [2, 1, 0, 0 if together == 1 else 1024]], np.int32)
    config = scores_stage.Config(n_score=n_score, n_keys=n_keys, ring=2, together=together)
    columns = Columns(
        limit=jnp.asarray(limit),
        n=S,
        tiles=jnp.asarray(tiles),
        keep_first=keep,
        keep_last=keep,
        threshold=None if threshold is None else jnp.full((T,), threshold, jnp.int32),
    )
    operands = Operands(q[0], w[0], k.swapaxes(0, 1), None if scale is None else scale[0])
    out = scores_stage.scores(operands, columns, config=config, maxima_of=maxima_of, n_ctas=n_ctas, interpret=interpret)
    sort_keys, others = out if isinstance(out, tuple) else (out, None)
    masks, maxima = (None, others) if threshold is None else (others, None)
    want = n_parts * reference.token_scores(q[0], k[0], None if scale is None else scale[0], w[0])
    for t in np.flatnonzero(limit):
        bits = want[t].astype(np.float32).view(np.int32)
        sort_key = np.where(bits < 0, bits ^ FORCED, bits)
        sort_key[bits == INVISIBLE] = 0  # -0.0
        sort_key[: min(keep, limit[t])] = FORCED
        sort_key[max(limit[t] - keep, 0) : limit[t]] = FORCED
        sort_key[limit[t] :] = INVISIBLE
        passes = np.ones(S, bool) if threshold is None else sort_key > threshold
        got = np.asarray(sort_keys[t])[:S]
        if masks is not None:
            sort_key = reference.side_by_side(sort_key, passes, INVISIBLE)
            got = np.where(sort_key == INVISIBLE, INVISIBLE, got)
        np.testing.assert_array_equal(got, sort_key)
        if masks is not None:
            bits = np.asarray(masks[t]).view(np.uint32)[:, None] >> np.arange(32, dtype=np.uint32) & 1
            np.testing.assert_array_equal(bits.reshape(-1)[:S], passes)
        if maxima is not None:
            wanted = np.max(sort_key[: S // maxima_of * maxima_of].reshape(-1, maxima_of), axis=1)
            seen = -(-limit[t] // maxima_of)
            np.testing.assert_array_equal(maxima[t, :seen], wanted[:seen])


CASES = [(16, 64, E4M3, 2, 2, None), (16, 64, BF16, 1, 2, None), (32, 64, E4M3, 1, 3, 1086324736)]  # sort key of 6.0


@pytest.mark.parametrize("case", CASES, ids=["means", "bf16", "filtered"])
def test_sort_keys_limits_forced_and_masks(interpret, case):
    check(*case, interpret, n_ctas=2)


@pytest.mark.gpu
@pytest.mark.parametrize("maxima_of", [2, 8])
@pytest.mark.parametrize(("H", "D", "dtype"), [(64, 128, E4M3), (16, 64, BF16)])
def test_greatest_of_neighbours_on_the_device(H, D, dtype, maxima_of):
    skip_unless_hopper(H, D, dtype)
    check(H, D, dtype, 1, 2, None, False, n_ctas=1, maxima_of=maxima_of, n_keys=3)


@pytest.mark.gpu
@pytest.mark.parametrize("H", [16, 32, 64, 128])
@pytest.mark.parametrize(
    ("D", "dtype", "n_parts"), [(64, E4M3, 2), (128, E4M3, 1), (128, E4M3, 2), (64, BF16, 1), (128, BF16, 1)]
)
@pytest.mark.parametrize("threshold", [None, 1086324736])
def test_on_the_device(H, D, dtype, n_parts, threshold):
    skip_unless_hopper(H, D, dtype)
    check(H, D, dtype, n_parts, 2, threshold, False)


@pytest.mark.gpu
def test_a_tile_is_not_overwritten_while_it_is_read():
    """One query a tile of keys: the loader is always a tile ahead."""
    if jax.default_backend() != "gpu" or mosaic_gpu.why_not(
        jax.devices()[0].compute_capability, 64, 128, E4M3, topk=64
    ):
        pytest.skip("needs a Hopper GPU")
    T, S, n_ctas = 1000, 256, 8
    q, k, scale, w = (x[0] for x in draw.integers(3, 1, T, T * S, 64, 128, E4M3, True))
    scale = scale * (1 + jnp.arange(T * S) // S % 7)  # neighbours differ
    first = np.arange(T, dtype=np.int32)
    tiles = np.stack([first, np.ones_like(first), first * S, np.full_like(first, 1024)], axis=1)
    config, limit = scores_stage.Config(n_score=2), jnp.full((T,), S, jnp.int32)
    operands, columns = Operands(q, w, k[:, None], scale), Columns(limit=limit, n=S, tiles=jnp.asarray(tiles))
    sort_keys = np.asarray(scores_stage.scores(operands, columns, config=config, n_ctas=n_ctas))[:, :S]
    got = np.where(sort_keys < 0, sort_keys ^ FORCED, sort_keys).view(np.float32)
    for t in range(T):
        own = slice(t * S, (t + 1) * S)
        np.testing.assert_array_equal(got[t], reference.token_scores(q[t : t + 1], k[own], scale[own], w[t : t + 1])[0])


def check_scattered(H, D, dtype, n_parts, n_keys, T, interpret, n_ctas):
    """A query a sequence of 300 keys, whose rows a table scatters: the sort keys of the same rows in order."""
    S, n_rows = 300, 320
    q, k, scale, w = (x if x is None else x[0] for x in draw.integers(4, 1, T, T * n_rows, H, D, dtype, dtype == E4M3))
    k = jnp.stack([k, k[::-1]][:n_parts], axis=1)
    limit = jnp.asarray([S, 257, 0, 3] * T, jnp.int32)[:T]
    tiles = jnp.stack([jnp.arange(T), jnp.ones(T), jnp.arange(T) * n_rows, limit], axis=1).astype(jnp.int32)
    columns = Columns(limit=limit, n=S, tiles=tiles)
    options = dict(config=scores_stage.Config(n_score=2, n_keys=n_keys, ring=2, tile_t=1), n_ctas=n_ctas)
    scores = lambda k, scale, pages: scores_stage.scores(  # noqa: E731
        Operands(q, w, k, scale, pages), columns, **options, interpret=interpret
    )
    table = np.random.default_rng(5).permutation(T * n_rows).astype(np.int32)
    order = np.argsort(table)
    pages = Pages(table=jnp.asarray(table), size=1, n_pages=T * n_rows)
    got = scores(k[order], None if scale is None else scale[order], pages)
    wanted = scores(k, scale, None)
    for t in range(T):
        np.testing.assert_array_equal(got[t, : limit[t]], wanted[t, : limit[t]])


@pytest.mark.parametrize(("dtype", "n_parts"), [(E4M3, 2), (BF16, 1)], ids=["means", "bf16"])
@pytest.mark.gate("bf16")  # means of two parts: in order, above
def test_scattered_rows_score_as_rows_in_order(interpret, dtype, n_parts):
    check_scattered(16, 64, dtype, n_parts, 2, 3, interpret, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("n_keys", [1, 2])
@pytest.mark.parametrize(("H", "D", "dtype", "n_parts"), [(64, 128, E4M3, 2), (16, 64, E4M3, 2), (128, 128, BF16, 1)])
def test_scattered_rows_on_the_device(H, D, dtype, n_parts, n_keys):
    skip_unless_hopper(H, D, dtype)
    check_scattered(H, D, dtype, n_parts, n_keys, 200, False, 8)


def test_a_tile_goes_back_after_what_ptxas_cannot_know():
    """An operand may be a number when a call is traced. Then ptxas leaves out what holds the arrival back."""
    shape = Shape(
        H=64, row_bytes=128, n_parts=1, is_e4m3=True, ring=4, has_scale=True, keep_first=0, keep_last=0,
        out_columns=1024, filters=False,
    )  # fmt: skip
    ptx = loop_ptx(shape)
    (mask,) = re.findall(r"and\.b32 t, t, (\w+); add\.u32 t, t, \$K_FREE;", ptx)
    sources = {x for written in re.findall(rf"\w+\.\w+ {mask}, ([^;]*);", ptx) for x in written.split(", ")}
    assert sources == {"%smid", mask, "16"}


@pytest.mark.parametrize(("H", "together"), [(16, 1), (32, 2), (64, 1), (128, 1)])
@pytest.mark.parametrize(("row_bytes", "n_parts"), [(64, 2), (128, 1), (256, 1)])
@pytest.mark.parametrize("filters", [False, True])
@pytest.mark.parametrize("pitch", [None, 272])
def test_no_register_of_the_loop_is_read_before_it_is_written(H, together, row_bytes, n_parts, filters, pitch):
    shape = Shape(
        H=H,
        together=together,
        row_bytes=row_bytes,
        n_parts=n_parts,
        is_e4m3=row_bytes < 256,
        ring=8,
        has_scale=row_bytes < 256,
        keep_first=1,
        keep_last=1,
        out_columns=512,
        filters=filters,
        pitch=pitch,
        maxima_of=0 if filters else 8,
    )
    assert not list(unwritten(loop_ptx(shape)))


@pytest.mark.parametrize("rows", [2, 4, 8, 16])
@pytest.mark.parametrize("filters", [False, True])
def test_no_register_of_the_loop_over_groups_is_read_before_it_is_written(rows, filters):
    shape = Shape(
        H=64,
        row_bytes=128,
        n_parts=1,
        is_e4m3=True,
        ring=8,
        has_scale=True,
        keep_first=1,
        keep_last=1,
        out_columns=512,
        filters=filters,
        rows=rows,
        n_linear=2,
        n_rows=rows,
    )
    assert not list(unwritten(loop_ptx(shape)))


def test_no_register_of_the_list_is_read_before_it_is_written():
    assert not list(unwritten(list_ptx(1024)))


@pytest.mark.parametrize("has_scale", [False, True])
def test_no_register_of_the_row_copies_is_read_before_it_is_written(has_scale):
    assert not list(unwritten(copy_ptx(256, 256, 1000, 2000, has_scale)))


def unwritten(ptx):
    """Registers that PTX reads above the line that first writes them: ptxas takes them for anything, silently."""
    ptx = re.sub(r"%[\w.]+|\$\w+", "", ptx)
    ptx = re.sub(r"(\w+)<(\d+)>", lambda name: ", ".join(f"{name[1]}{i}" for i in range(int(name[2]))), ptx)
    names = {name for line in re.findall(r"\.reg \.\w+ ([^;]*);", ptx) for name in re.findall(r"\w+", line)}
    registers = lambda text: [x for x in re.findall(r"\b\w+\b", text) if x in names]  # noqa: E731
    written = set()
    for statement in re.sub(r"\.reg[^;]*;", "", ptx).strip("{}").split(";"):
        statement = re.sub(r"^\s*\w+:\s*", "", statement).strip()
        guard, op, operands = re.match(r"(@!?\w+\s+)?(\S*)(.*)", statement, re.DOTALL).groups()
        ends = operands.find("}") if operands.lstrip().startswith("{") else operands.find(",")
        writes = op and not op.startswith(
            ("st.", "bra", "mbarrier.arrive", "wgmma.wait", "wgmma.commit", "wgmma.fence")
        )
        for name in registers((guard or "") + (operands[ends:] if writes else operands)):
            if name not in written:
                yield name, statement
        written.update(registers(operands[:ends]) if writes else [])


def test_ctas_end_together_where_queries_are_the_last_ones():
    sizes = scores_stage.Sizes(T=4096, H=64, D=128, n_parts=1, itemsize=1, n_sequences=1)
    config = scores_stage.heuristic(sizes, 8192, n_score=3)
    even = scores_stage.for_last_queries(config, sizes, [0], 8192, 132)
    rounds = [
        -(-sum(-(-min(t + tile, 4096) // 384) + 11 for t in range(0, 4096, tile)) // 132)  # 11 spans all queries see
        for tile in (config.tile_t, even.tile_t)
    ]
    assert rounds[1] * even.tile_t < 0.97 * rounds[0] * config.tile_t
    # One query of each of many sequences has a tile by itself.
    one = dataclasses.replace(config, tile_t=1)
    assert scores_stage.for_last_queries(one, sizes._replace(T=128, n_sequences=128), [0], 8192, 132) == one


def test_two_queries_of_32_heads_share_a_product_where_a_sequence_has_several():
    sizes = scores_stage.Sizes(T=4095, H=32, D=128, n_parts=1, itemsize=1, n_sequences=1)
    config = scores_stage.heuristic(sizes, 8192)
    assert config.together == 2 and config.tile_t % 2 == 0
    assert scores_stage.heuristic(sizes._replace(T=128, n_sequences=128), 8192).together == 1
    assert scores_stage.heuristic(sizes._replace(H=64), 8192).together == 1


def test_a_launch_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"Config\(n_keys=5\): must be 1 to 4, a warp of the loader each"):
        scores_stage.Config(n_keys=5)
    with pytest.raises(ValueError, match="scores: maxima_of = 8 with a threshold"):
        check(16, 64, BF16, 1, 2, 0, False, maxima_of=8)
