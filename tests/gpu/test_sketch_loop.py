"""The scan of sketches by Mosaic: its PTX run by a machine in NumPy, the kernel around it interpreted, all on a GPU.

Whole numbers, of which no sum is rounded.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax.kernels_pallas.mosaic_gpu import scan_sketch
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.sketch_loop_text import OPERANDS, Shape, loop_ptx
from hisa_jax.kernels_pallas.operands import Columns, ScanHeads
from hisa_jax.kernels_pallas.pages import Pages
from tests.gpu.ptx_machine import Machine
from tests.gpu.test_lowering import BF16, E4M3, lower
from tests.gpu.test_scan_sketch import Requests

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

SAMPLE_STEP = 16


def requests(n_queries, R, n, n_linear, page_size=64, lengths=(300, 129, 17)):
    return Requests(E4M3, list(lengths), n_queries, page_size, 128, R, n, n_linear)


def columns_of(given, config):
    flat = given.flat
    tiles = flat.sequences.query_tiles(len(given.visible), config.tile_t, flat.visible, scan_sketch.STEP)
    return Columns(limit=flat.visible, n=flat.sequences.max_keys, tiles=tiles)


def launched(given, config, interpret):
    sketches = given.operands.k, given.operands.code_scales, given.operands.k_scale, given.operands.pages
    columns, first = columns_of(given, config), None
    if config.tile_t == 1:
        columns = dataclasses.replace(columns, tiles=None)
        first = given.flat.sequences.key_start_of_queries(len(given.visible))
    options = dict(sample_step=SAMPLE_STEP, config=config, interpret=interpret)
    return scan_sketch.scan_sort_keys(*sketches, given.heads, columns, first, **options)


def check(given, got):
    for t, sort_keys in enumerate(given.sort_keys()):
        np.testing.assert_array_equal(got[0][t, : len(sort_keys)], sort_keys, err_msg=f"query {t}")
        samples = sort_keys[::SAMPLE_STEP]
        np.testing.assert_array_equal(got[1][t, : len(samples)], samples, err_msg=f"samples of query {t}")


def by_machine(given, config):
    """Every CTA of a launch, one after the other."""
    sketches, columns = given.operands, columns_of(given, config)
    (T, R, _), width = given.heads.q.shape, -(-columns.n // scan_sketch.STEP) * scan_sketch.STEP
    shape = Shape(
        queries=config.tile_t, rows=R, n=given.heads.n, n_linear=given.heads.n_linear, page_size=sketches.pages.size,
        n_pages=sketches.pages.n_pages, table_size=len(sketches.pages.table), has_scale=True, out_columns=width,
        sample_step=SAMPLE_STEP,
    )  # fmt: skip
    arrays = sketches.k, sketches.code_scales, sketches.k_scale, sketches.pages.table, given.heads.q, given.heads.w
    # One after the other, each from a multiple of 256 bytes on.
    words, at = [], []
    widths = width, width // SAMPLE_STEP
    for array in (*arrays, *(jnp.zeros((T, n), jnp.int32) for n in widths)):
        at.append(4 * sum(map(len, words)))
        array = np.frombuffer(np.asarray(array).tobytes(), np.uint32)
        words.append(np.pad(array, (0, -len(array) % 64)))
    memory = np.concatenate(words)
    for first, n_queries, row, most in np.asarray(columns.tiles):
        for token in range(0, width, scan_sketch.STEP * config.steps):
            steps = int(np.clip(-(-(most - token) // scan_sketch.STEP), 0, config.steps))
            own = dict(zip(OPERANDS, at, strict=False))
            own["Q"], own["W"], own["O"] = at[4] + first * R * 128, at[5] + first * R * 4, at[6] + first * width * 4
            own["SAMPLES"] = at[7] + first * widths[1] * 4
            own |= dict(SMEM=0, ROW=row, START=token, STEPS=steps, N_QUERIES=n_queries)
            text = loop_ptx(shape)
            for i in reversed(range(len(OPERANDS))):
                text = text.replace(f"${i}", OPERANDS[i].lower() + "_")
            operands = {name.lower() + "_": value for name, value in own.items()}
            cta = Machine(text, 128, operands, memory, shape.smem_bytes)
            cta.run()
            memory = cta.memory
    return tuple(
        memory[start // 4 :][: T * n].view(np.int32).reshape(T, n) for start, n in zip(at[6:], widths, strict=True)
    )


@pytest.mark.parametrize(
    ("n_queries", "R", "n", "n_linear", "config"),
    [
        ([1, 1, 1], 8, 6, 2, dict(tile_t=1, steps=2)),
        pytest.param([1, 1, 1], 4, 3, 2, dict(tile_t=1, steps=1), marks=pytest.mark.exhaustive),
        pytest.param([4, 1, 0], 8, 6, 2, dict(tile_t=4, steps=3), marks=pytest.mark.exhaustive),
        pytest.param([3, 1, 2], 16, 13, 2, dict(tile_t=2, steps=5), marks=pytest.mark.exhaustive),
    ],
    ids=["decode", "2_rows", "drafts", "13_rows"],
)
def test_the_machine_has_the_sort_keys_of_whole_numbers(n_queries, R, n, n_linear, config):
    given = requests(n_queries, R, n, n_linear)
    check(given, by_machine(given, scan_sketch.Config(**config)))


@pytest.mark.exhaustive
@pytest.mark.parametrize("tile_t", [1, 2])
def test_the_kernel_around_it(interpret, tile_t):
    given = requests([4, 1, 0], 8, 6, 2)
    check(given, launched(given, scan_sketch.Config(tile_t=tile_t, steps=2), interpret))


@pytest.mark.gpu
@pytest.mark.parametrize("n_queries", [1, 2, 5])
@pytest.mark.parametrize(("R", "n", "n_linear"), [(2, 1, 1), (4, 3, 2), (8, 6, 2), (16, 16, 2)])
@pytest.mark.parametrize("page_size", [32, 64, 128])
def test_on_the_device(page_size, R, n, n_linear, n_queries):
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    given = requests([n_queries, 1, 1, 0, n_queries], R, n, n_linear, page_size, lengths=(5000, 777, 1, 0, 12345))
    config = scan_sketch.heuristic(len(given.visible), 5, R, 12345, 132)
    check(given, launched(given, config, False))
    check(given, launched(given, dataclasses.replace(config, steps=1000), False))


@pytest.mark.parametrize(
    ("T", "R"), [(32, 8), pytest.param(128, 16, marks=pytest.mark.exhaustive)], ids=["decode", "drafts"]
)
def test_it_lowers(T, R):
    """32 requests of 128K in pages of 64."""
    n_requests, P, size = 32, 2048, 64
    n, i32, f32 = n_requests * P, jnp.int32, jnp.float32
    config = scan_sketch.heuristic(T, n_requests, R, P * size, 132)

    def scan(codes, code_scales, k_scale, table, q, w, limit, tiles):
        heads = ScanHeads(q=q, w=w, n_linear=2, n=R)
        of_tiles = dict(tiles=tiles) if config.tile_t > 1 else {}
        columns = Columns(limit=limit, n=P * size, **of_tiles)
        pages = Pages(table=table, size=size, n_pages=n)
        arrays = codes, code_scales, k_scale, pages, heads, columns, None if of_tiles else limit
        return scan_sketch.scan_sort_keys(*arrays, sample_step=16, config=config)

    keys = ((n * size, 64), jnp.uint8), ((n * size, 4), BF16), ((n * size,), f32), ((n,), i32)
    queries = ((T, R, 128), E4M3), ((T, R), f32), ((T,), i32), ((T, 4), i32)
    assert "mosaic_gpu" in lower(scan, *keys, *queries)


def test_what_it_declines():
    assert scan_sketch.why_not(128, 1, 32, 128) is None
    with pytest.raises(ValueError, match="a query a CTA"):
        given = requests([4, 1, 0], 8, 6, 2)
        columns = Columns(limit=given.flat.visible, n=384)
        arrays = given.operands.k, given.operands.code_scales, None, given.operands.pages, given.heads, columns
        scan_sketch.scan_sort_keys(*arrays, sample_step=16, config=scan_sketch.Config(tile_t=2, steps=1))
    for D, itemsize, page_size, step in ((64, 1, 64, 16), (128, 2, 64, 16), (128, 1, 16, 16), (128, 1, 64, 256)):
        assert "needs" in scan_sketch.why_not(D, itemsize, page_size, step)
