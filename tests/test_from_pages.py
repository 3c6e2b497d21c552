"""IndexCache.from_pages: pages that others have written say of themselves what `append` would have written."""

import dataclasses
import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import hisa_jax as hj
from tests import draw

PAGE, D, N_PAGES = 16, 48, 9
# A page that two requests share, of which the second has less in it; a page of one token; pages that nobody has.
TABLE = np.array([[3, 0, 6, 1], [3, 5, -1, 99], [7, -1, -1, -1]], np.int32)
LENGTHS = np.array([61, 20, 1], np.int32)
FULL = np.array([0, 3, 6])


def appended(dtype, sketch=None, block_size=None):
    """The same by `append`, request by request, and 7 where no token is."""
    k = draw.inputs(3, 1, 64, 1, D, seed=2).k
    cache = hj.init_cache(N_PAGES, PAGE, D, dtype, sketch=sketch, block_size=block_size)
    cache = dataclasses.replace(cache, keys=jnp.full_like(cache.keys, 7))
    k[1, :PAGE] = k[0, :PAGE]
    new = jnp.concatenate([jnp.asarray(k[r, : LENGTHS[r]]) for r in (0, 1, 2)])
    new = new.astype(dtype) if cache.scales is None else hj.quantize_keys(new, dtype)
    return hj.append(cache, new, jnp.asarray(TABLE), jnp.cumsum(jnp.array([0, *LENGTHS])), jnp.zeros(3, jnp.int32))


def of_pages(cache, table=TABLE, lengths=LENGTHS, **options):
    k = cache.keys if cache.scales is None else hj.QuantizedKeys(cache.keys, cache.scales)
    return hj.IndexCache.from_pages(k, jnp.asarray(table), jnp.asarray(lengths), **options)


@pytest.mark.gate("float8_e4m3fn-None")
@pytest.mark.parametrize("sketch", [None, "int4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float8_e4m3fn", "int8"])
def test_pages_say_what_append_has_written(dtype, sketch):
    options = dict(sketch=sketch, block_size=2 * PAGE if sketch is None else None)
    wanted = appended(dtype, **options)
    eager, jitted = of_pages(wanted, **options), jax.jit(lambda cache: of_pages(cache, **options))(wanted)
    assert eager.keys is wanted.keys, "the keys were copied"
    for got in (eager, jitted):
        for field in dataclasses.fields(hj.IndexCache):
            given, expected = getattr(got, field.name), getattr(wanted, field.name)
            if field.name in ("codes", "code_scales") and sketch:  # those of no token are anything
                given, expected = given[FULL], expected[FULL]
            jax.tree.map(np.testing.assert_array_equal, given, expected)


def test_the_example_runs():
    (example,) = doctest.DocTestFinder(recurse=False).find(hj.IndexCache.from_pages, globs={"hj": hj, "jnp": jnp})
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.exhaustive
def test_pages_that_no_float32_holds_at_once_are_read_in_parts(monkeypatch):
    monkeypatch.setattr("hisa_jax.xla.describe._NUMBERS", 2 * PAGE * D)
    wanted = appended("float32")
    for name in ("sums", "counts", "places"):
        np.testing.assert_array_equal(getattr(of_pages(wanted), name), getattr(wanted, name))


WRONG = {
    "int64": (dict(block_tables=TABLE.astype(np.int64)), "IndexCache.from_pages: block_tables is int64, wanted int32"),
    "flat": (dict(block_tables=TABLE.reshape(-1)), "block_tables is [12], wanted [R, P]: a flat table is"),
    "two_places": (dict(block_tables=TABLE[:, ::-1]), "lacks pages of requests [1, 2], wanted for each of its"),
    "named_twice": (dict(block_tables=np.where(TABLE == 5, 3, TABLE)), "lacks pages of requests [0, 1], wanted"),
    "no_page": (dict(lengths=LENGTHS + 16), "lacks pages of requests [0, 1, 2], wanted for each of its tokens, up to"),
    "lengths": (dict(lengths=-LENGTHS), "lacks pages of requests [0, 1, 2]"),
    "few_lengths": (dict(lengths=LENGTHS[:2]), "lengths is [2], wanted [3]: one length a request (block_tables"),
    "e4m3": (dict(k=jnp.ones((9, 16, 8), jnp.float8_e4m3fn)), "k is float8_e4m3fn, wanted bfloat16 or float32"),
    "scales": (
        dict(k=hj.QuantizedKeys(jnp.ones((9, 16, 8), jnp.int8), jnp.ones((9, 8)))),
        "k.scales is [9, 8], wanted [9, 16]: one scale a key",
    ),
    "rows": (dict(k=jnp.ones((144, 8))), "k is [144, 8], wanted [n_pages, page_size, D]"),
    "size": (dict(k=jnp.ones((9, 24, 8))), "page_size=24, wanted a power of two up to 256"),
    "sketch": (dict(sketch="int8"), "sketch='int8', wanted None or one of int4"),
    "latents": (dict(latents=jnp.ones((9, 8, 3))), "latents is [9, 8, 3], wanted [9, 16, Dk]: pages as k has them"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_pages_cannot_be_is_named(name):
    change, message = WRONG[name]
    valid = dict(k=jnp.ones((N_PAGES, PAGE, 8)), block_tables=TABLE, lengths=LENGTHS)
    with pytest.raises((TypeError, ValueError)) as error:
        hj.IndexCache.from_pages(**valid | change)
    assert message in str(error.value)


def count(table):
    k, lengths, one = jnp.ones((N_PAGES, PAGE, 8)), jnp.asarray(LENGTHS), jnp.array([0, 1, 2, 3])
    cache = hj.IndexCache.from_pages(k, table, lengths)
    return hj.select_paged(jnp.ones((3, 2, 8)), jnp.ones((3, 2)), cache, table, one, lengths, hj.Dsa(topk=4)).count


TWICE = np.where(TABLE == 7, 0, TABLE)  # of the places of page 0 the later is right


def test_a_page_at_two_places_selects_nothing_under_jit():
    assert jax.jit(count)(jnp.asarray(TWICE)).tolist() == [4, 4, 0]


@pytest.mark.exhaustive
def test_a_page_at_two_places_is_an_error_under_checked():
    with pytest.raises(checkify.JaxRuntimeError, match="from_pages: block_tables lacks pages of requests"):
        hj.checked(count)(jnp.asarray(TWICE))
