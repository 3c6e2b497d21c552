"""The scan of a few queries: all scan scores in memory, lists made from them without the host.

Lists of rows of all kinds are one program, compiled in some 4 s; whole selections are `exhaustive`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax.kernels_pallas.flat_call import FlatCall
from hisa_jax.kernels_pallas.mosaic_gpu import list_best as mosaic_list
from hisa_jax.kernels_pallas.mosaic_gpu import stages
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.list_best import sample_of
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.list_best_text import OPERANDS, Row, list_ptx
from hisa_jax.kernels_pallas.operands import ScanHeads
from hisa_jax.kernels_pallas.pages import Pages
from hisa_jax.kernels_pallas.scan import Ask
from hisa_jax.kernels_pallas.sequences import Sequences
from hisa_jax.kernels_pallas.sort_key import sort_key_of
from hisa_jax.kernels_pallas.triton import list_best as triton_list
from hisa_jax.layout import Sketched
from tests.gpu.ptx_machine import Machine
from tests.gpu.test_lowering import lower

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
WIDTH, LEAST, MOST = 1056, 80, 128  # no whole number of what a warp marks at a time
ASK = Ask(least=LEAST, most=MOST, rank=26, step=4)
ASK_128K = Ask(least=8192, most=12288, rank=626, step=16)
FORCED = dict(keep_first=2, keep_last=3)


def rows():
    """Scores of a row, and how many of them are candidates."""
    rng, sampled = np.random.default_rng(0), np.arange(WIDTH) % 4 == 0
    normal = rng.normal(size=WIDTH)
    yield "normal", normal, WIDTH
    yield "fewer candidates", normal, 777
    yield "as many as fit", normal, MOST
    yield "hardly more", normal, MOST + 1
    yield "none", normal, 0
    yield "one", normal, 1
    yield "all tie", np.zeros(WIDTH), WIDTH
    yield "many tie, few are above", np.where(rng.random(WIDTH) < 0.03, 5.0, 1.0), WIDTH
    yield "samples are the best", normal + 9 * sampled, WIDTH
    yield "samples are the worst", normal - 9 * sampled, WIDTH
    yield "infinite and none", np.where(rng.random(WIDTH) < 0.3, np.nan, np.inf * np.sign(normal)), WIDTH
    yield "ascending", np.arange(WIDTH) * 1.0, WIDTH
    yield "the first and the last are worst", np.where(np.abs(np.arange(WIDTH) - 500) > 490, -99, normal), WIDTH


def check(list_best):
    """A function of sort keys and limits."""
    names, scores, limits = zip(*rows(), strict=True)
    sort_keys = sort_key_of(jnp.asarray(np.stack(scores), jnp.float32))
    tokens, counts = map(np.asarray, list_best(sort_keys, jnp.asarray(limits, jnp.int32)))
    for name, x, n, got, count in zip(names, np.asarray(sort_keys), limits, tokens, counts, strict=True):
        listed = got[:count]
        assert min(n, LEAST) <= count <= MOST and (got[count:] == -1).all(), name
        assert (np.diff(listed) > 0).all() and ((listed >= 0) & (listed < n)).all(), name
        if n <= MOST:
            assert count == n, name
        forced = (np.arange(n) < 2) | (np.arange(n) >= n - 3)
        assert np.isin(np.flatnonzero(forced), listed).all(), name
        others, left = listed[~forced[listed]], np.setdiff1d(np.flatnonzero(~forced), listed)
        if len(left):
            # The best, and of those that tie at the end the first.
            at = x[others].min()
            assert x[left].max() <= at, name
            tied = np.flatnonzero((x[:n] == at) & ~forced)
            np.testing.assert_array_equal(others[x[others] == at], tied[: (x[others] == at).sum()], err_msg=name)


class AtTheEnd(Row):
    """A row whose list has no room in place of the samples."""

    list = property(lambda row: row.bits + 2 * row.bits_bytes)


def by_machine(sort_keys, limits, side_by_side=False):
    """The PTX, a row after the other."""
    sample = sample_of(-(-WIDTH // ASK.step), ASK.rank)
    apart = 1 if side_by_side else ASK.step
    row = (Row if side_by_side else AtTheEnd)(
        width=WIDTH, step=ASK.step, apart=apart, least=LEAST, most=MOST, **FORCED, sample=sample
    )
    text = list_ptx(row)
    for i in reversed(range(len(OPERANDS))):
        text = text.replace(f"${i}", OPERANDS[i].lower() + "_")
    lists = []
    for x, limit in zip(np.asarray(sort_keys), np.asarray(limits), strict=True):
        samples = x[:: ASK.step]
        memory = np.concatenate([x, np.full(MOST + 8, 0xDEAD, np.int32), samples]).view(np.uint32)
        at = dict(
            x_=0,
            samples_=4 * (len(memory) - len(samples)) if side_by_side else 0,
            limit_=int(limit),
            o_=4 * WIDTH,
            count_=4 * (WIDTH + MOST),
            smem_=0,
        )
        cta = Machine(text, sample.n_threads, at, memory, row.smem_bytes)
        cta.run()
        got = cta.memory[WIDTH:].view(np.int32)
        assert (got[MOST + 1 : MOST + 8] == 0xDEAD).all()
        lists.append((got[:MOST], got[MOST]))
    return tuple(map(np.stack, zip(*lists, strict=True)))


def test_a_list_has_the_best_and_of_those_that_tie_the_first():
    check(functools.partial(triton_list.list_best, ask=ASK, **FORCED, interpret=True))


@pytest.mark.parametrize("side_by_side", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_the_machine_lists_them_too(side_by_side):
    check(functools.partial(by_machine, side_by_side=side_by_side))


def test_the_kernel_around_it(interpret):
    check(functools.partial(mosaic_list.list_best, ask=ASK, **FORCED, interpret=interpret))


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [triton_list, mosaic_list], ids=["triton", "mosaic_gpu"])
def test_on_the_device(stage):
    check(functools.partial(stage.list_best, ask=ASK, **FORCED))


@pytest.mark.gpu
@pytest.mark.parametrize("W", [131072, 1 << 19])
def test_long_rows_are_listed_on_the_device(W):
    x = sort_key_of(jax.random.normal(jax.random.key(0), (132, W)))
    limit = jnp.asarray(np.random.default_rng(0).integers(1, W, 132), jnp.int32).at[0].set(W)
    ask = ASK_128K._replace(rank=max(626 * 131072 // W, 200), step=16 * W // 131072)
    tokens, count = (np.asarray(out) for out in mosaic_list.list_best(x, limit, ask, x[:, :: ask.step], **FORCED))
    x = np.asarray(x)
    for t, n in enumerate(np.asarray(limit)):
        listed = tokens[t, : count[t]]
        assert min(n, 8192) <= count[t] <= 12288 and (np.diff(listed) > 0).all() and (tokens[t, count[t] :] == -1).all()
        inner = listed[(listed >= 2) & (listed < n - 3)]
        left = np.setdiff1d(np.arange(2, n - 3), inner)
        assert not len(left) or x[t, left].max() < x[t, inner].min()


@pytest.mark.parametrize("stage", [triton_list, mosaic_list], ids=["triton", "mosaic_gpu"])
def test_lists_lower(stage):
    list_best = functools.partial(stage.list_best, ask=ASK_128K, **FORCED)
    text = lower(list_best, ((128, 131072), jnp.int32), ((128,), jnp.int32))
    assert "custom_call" in text


@pytest.mark.parametrize(
    ("n_requests", "n_queries", "sketch", "way"),
    [
        (1, 1, False, "flat"), (32, 1, False, "flat"), (32, 4, False, "flat"), (1, 16, False, "flat"),
        (1, 128, False, "samples"), (133, 1, False, "samples"), (8, 1, True, "flat"), (9, 1, True, "lists"),
        (32, 4, True, "lists"), (1, 128, True, "lists"), (133, 1, True, "samples"),
    ],
)  # fmt: skip
def test_which_way_hopper_scans(monkeypatch, n_requests, n_queries, sketch, way):
    monkeypatch.setattr(stages, "n_sms", lambda: 132)
    T, S = n_requests * n_queries, 131072
    starts = np.arange(n_requests, dtype=np.int32)
    sequences = Sequences(
        query_starts=np.append(starts * n_queries, T), key_starts=starts * S, lengths=starts * 0 + S, max_keys=S
    )
    none = jnp.zeros((T, 64, 128), jnp.float8_e4m3fn)
    call = FlatCall(q=none, w=none, visible=none, k=none, k_scale=None, sequences=sequences, sketch=sketch or None)
    assert stages.way_of_scan(call, 2048) == way


def test_only_lists_have_sketches_scanned_four_queries_at_a_time(monkeypatch):
    """Samples are Triton's, also where all keys are samples of many queries, of fewer than 1024 candidates."""
    monkeypatch.setattr(stages.triton_stages, "scan_sort_keys", lambda *_: "triton")
    monkeypatch.setattr(stages.sketch_stage, "scan_sort_keys", lambda *_, **__: "mosaic_gpu")
    starts, S, T = np.array([0], np.int32), 4096, 132
    sequences = Sequences(query_starts=np.append(starts, T), key_starts=starts, lengths=starts + S, max_keys=S)
    heads = ScanHeads(q=jnp.zeros((T, 8, 128), jnp.float8_e4m3fn), w=jnp.zeros((T, 8)), n_linear=2, n=6)
    pages = Pages(table=jnp.arange(S // 64, dtype=jnp.int32), size=64, n_pages=S // 64)
    call = FlatCall(
        q=heads.q, w=heads.w, visible=jnp.full((T,), S, jnp.int32), k=heads.q, k_scale=None, sequences=sequences,
        pages=pages, sketch=Sketched(None, None, None, 128, heads.q.dtype),
    )  # fmt: skip
    assert stages.scan_sort_keys(call, heads, 1) == "triton"
    assert stages.scan_all(call, heads, 16) == "mosaic_gpu"
