"""Nothing leaves a trace but what is selected: NaN and Inf elsewhere change no bit, nor do they in another row.

Two compiled programs a case and form, of 20 columns and of 1, whatever they are fed. In the gate a case has one form.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hisa_jax as hj
from hisa_jax import models
from hisa_jax.models.cache import Cache, contiguous, empty_pages, kept_for
from hisa_jax.models.dsa import expanded

from . import golden

PAGE, PAGES = 4, 24
# Two rows of 17 and 9 tokens; room for more in pages that neither has, written as -1 and as a number beyond all pages.
TABLES = np.array([[5, 2, 11, 3, 8, 7, 4, -1], [14, 1, 9, 20, -1, PAGES, -1, -1]], np.int32)
LENGTHS = (17, 9)
WIDTH = 20
# Layers of the checkpoint that are kept, how they select, how index keys are stored. glm52 shares selections.
CASES = {
    "glm52-hisa": ("glm52", [0, 5], hj.Hisa(topk=8, block_size=4, block_topk=2), None),
    "dsv32-flat-e4m3": ("dsv32", [1], hj.Dsa(topk=8), "float8_e4m3fn"),
    "glm5-scan": ("glm5", [0], hj.Scan(topk=8, candidates=10, exact_heads=1, unit=2, sketch="int4"), None),
}
both = pytest.mark.parametrize("form", ["expanded", "absorbed"])
each_case = pytest.mark.parametrize("case", CASES)
some = pytest.mark.gate("dsv32-flat-e4m3-absorbed")


@functools.cache
def model(case):
    name, layers, method, key_dtype = CASES[case]
    whole = golden.model(name)
    config = dataclasses.replace(
        whole.config, num_hidden_layers=len(layers), index_key_dtype=key_dtype,
        **{kinds: tuple(getattr(whole.config, kinds)[i] for i in layers) for kinds in ("layer_kinds", "indexer_kinds")},
    )  # fmt: skip
    net = nnx.eval_shape(lambda: models.from_config(config, rngs=nnx.Rngs(0), method=method))
    net.embed, net.norm, net.head = whole.embed, whole.norm, whole.head
    for layer, source in enumerate(layers):
        nnx.update(net.layers[layer], nnx.state(whole.layers[source]))
    return net


@functools.partial(jax.jit, static_argnames=("graph", "form"))
def run(state, ids, cache, mask, *, graph, form):
    return nnx.merge(graph, state).run(ids, cache=cache, mask=mask, form=form, trace=True)


def call(net, ids, cache, mask, form):
    graph, state = nnx.split(net)
    return run(state, jnp.asarray(ids), cache, jnp.asarray(mask), graph=graph, form=form)


def tokens(case):
    return np.array(golden.ids(CASES[case][0]))[:2]


def prompts(case, form):
    """A cache with both rows' tokens in it, by way of a padded batch."""
    net = model(case)
    kept = [kept_for([CASES[case][2]])] * len(CASES[case][1])
    cache = Cache(
        layers=empty_pages(net.config, PAGES, PAGE, jnp.float32, kept), block_tables=jnp.asarray(TABLES),
        lengths=jnp.zeros((2,), jnp.int32),
    )  # fmt: skip
    return call(net, tokens(case)[:, :WIDTH], cache, np.arange(WIDTH) < np.array(LENGTHS)[:, None], form).cache


def is_used(lengths):
    """[PAGES, PAGE] bool: whether a place holds a token of a row."""
    used = np.zeros((PAGES, PAGE), bool)
    for row, length in enumerate(lengths):
        for token in range(length):
            used[TABLES[row, token // PAGE], token % PAGE] = True
    return used


def poisoned(cache, value, lengths=LENGTHS):
    """The cache with a value in everything that belongs to no token of a row: pages, and whole sums and means."""
    used = is_used(lengths)

    def fill(x, keep):
        if x is None:
            return None
        filling = value if jnp.issubdtype(x.dtype, jnp.floating) else 0 if value == 0 else 255
        keep = keep.reshape(*keep.shape, *(1,) * (x.ndim - keep.ndim))
        return np.where(keep, np.asarray(x), np.asarray(filling).astype(x.dtype))

    layers = tuple(
        dataclasses.replace(
            layer,
            **{
                name: fill(getattr(layer, name), used) for name in ("keys", "scales", "codes", "code_scales", "latents")
            },
            **{name: fill(getattr(layer, name), used.any(1)) for name in ("sums", "means", "mean_scales")},
        )
        for layer in cache.layers
    )
    return dataclasses.replace(cache, layers=layers)


@some
@both
@each_case
def test_what_no_token_of_a_row_wrote_changes_no_bit(case, form):
    """Pages that no row has, the rest of each row's last page, page 0 in place of no page; a chunk and a step."""
    net, cache, ids = model(case), prompts(case, form), tokens(case)
    mask = np.zeros((2, WIDTH), bool)
    mask[0, [1, 2, 5, 9, 10, 19]] = mask[1, [0, 7, 19]] = True
    for step, (chunk, real) in {
        "chunk": (ids[:, WIDTH:], mask),
        "decode": (ids[:, 30:31], np.ones((2, 1), bool)),
    }.items():
        want = call(net, chunk, poisoned(cache, 0), real, form)
        assert np.isfinite(np.asarray(want.logits)[real]).all()
        clean = call(net, ids[:, 31:32], want.cache, np.ones((2, 1), bool), form)
        for value in (np.nan, np.inf, -np.inf):
            got = call(net, chunk, poisoned(cache, value), real, form)
            np.testing.assert_array_equal(got.logits, want.logits, f"{step}, {value}")
            # Nor does what stood in a place that is written now stay in sums and means that later steps read.
            later = call(net, ids[:, 31:32], got.cache, np.ones((2, 1), bool), form)
            np.testing.assert_array_equal(later.logits, clean.logits, f"after {step}, {value}")


@pytest.mark.parametrize("lengths", [LENGTHS, (32, 30)])
def test_contiguous_holds_zeros_where_a_row_has_no_token(lengths):
    """Rows of more tokens than they have pages for included."""
    is_page = (TABLES >= 0) & (TABLES < PAGES)
    want = (np.arange(32) < np.array(lengths)[:, None]) & is_page.repeat(PAGE, axis=1)
    pages = np.full((PAGES, PAGE, 3), np.nan, np.float32)
    pages[TABLES[is_page]] = 1
    if lengths == LENGTHS:
        pages[~is_used(lengths)] = np.nan
    found = contiguous(jnp.asarray(pages), jnp.asarray(TABLES), jnp.asarray(lengths))
    np.testing.assert_array_equal(found, np.broadcast_to(want[..., None], found.shape).astype(np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_expanded_attention_to_a_poisoned_latent_is_nan_and_others_keep_their_bits(value):
    rng = np.random.default_rng(0)
    B, T, S, N, P, R, L, V = 1, 5, 12, 2, 6, 4, 8, 6
    q_nope, q_rope, kv, k_b, v_b = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((B, T, N, P), (B, T, N, R), (B, S, L + R), (L, N, P), (L, N, V))
    )
    indices = jnp.asarray([[[0, 1, -1], [2, 4, 7], [7, 9, 1], [-1, -1, -1], [3, 5, 6]]], jnp.int32)
    attend = jax.jit(lambda kv: expanded(q_nope, q_rope, kv, indices, k_b, v_b, 0.3))
    zeroed = kv.copy()
    zeroed[0, 7] = 0
    want = attend(zeroed)
    for column in (0, L, L + R - 1):  # of the latent, of the rope key
        poisoned = kv.copy()
        poisoned[0, 7, column] = value
        got = np.asarray(attend(poisoned))
        assert np.isnan(got[0, [1, 2]]).all()
        np.testing.assert_array_equal(got[0, [0, 3, 4]], want[0, [0, 3, 4]])


def with_poison(net, token, value):
    """The model with the embedding of one token replaced: rows that hold it become NaN."""
    net = nnx.clone(net)
    net.embed[...] = net.embed[...].at[token].set(value)
    return net


@some
@both
@each_case
def test_a_row_of_nan_changes_no_bit_of_another(case, form):
    """Attention, router, experts and norms; the row's own earlier tokens, columns of padding and later steps."""
    net, token = model(case), 3
    ids = tokens(case)[:, :WIDTH]
    ids[ids == token] = token + 1
    mask = np.ones((2, WIDTH), bool)
    mask[1, :4] = False
    poisoned_ids = ids.copy()
    poisoned_ids[0, 11] = poisoned_ids[1, 2] = token  # the second is padding
    pages = poisoned(prompts(case, form), 0, lengths=(0, 0))
    cache = dataclasses.replace(pages, lengths=jnp.zeros((2,), jnp.int32))
    want = call(net, ids, cache, mask, form)
    next_ids, is_next = np.array([[5], [6]]), np.ones((2, 1), bool)
    clean = call(net, next_ids, want.cache, is_next, form)
    for value in (np.nan, np.inf):
        bad = with_poison(net, token, value)
        got = call(bad, poisoned_ids, cache, mask, form)
        assert np.isnan(np.asarray(got.logits[0, 11])).all()
        np.testing.assert_array_equal(got.logits[0, :11], want.logits[0, :11], "tokens before it")
        np.testing.assert_array_equal(got.logits[1, 4:], want.logits[1, 4:], "the other row")
        for i, (layer, other) in enumerate(zip(got.layers, want.layers, strict=True)):
            np.testing.assert_array_equal(layer.hidden[1, 4:], other.hidden[1, 4:], f"layer {i}")
        later = call(bad, next_ids, got.cache, is_next, form)
        np.testing.assert_array_equal(later.logits[1], clean.logits[1], "a step later")


@both
@pytest.mark.gate("expanded")  # an embedding is looked up before there is a form
def test_an_id_outside_the_vocabulary_is_nan_and_changes_no_bit_of_another_row(form):
    """Under jit, where nothing can be raised; padding may have any id."""
    case = "glm5-scan"
    net, ids, mask = model(case), tokens(case)[:, :WIDTH], np.ones((2, WIDTH), bool)
    mask[1, :4] = False
    cache = dataclasses.replace(prompts(case, form), lengths=jnp.zeros((2,), jnp.int32))
    want = call(net, ids, cache, mask, form)
    for bad in (-1, net.config.vocab_size, 2**31 - 1, -(2**31)):
        given = ids.copy()
        given[1, :4] = bad
        np.testing.assert_array_equal(call(net, given, cache, mask, form).logits[:, 4:], want.logits[:, 4:])
        given[0, 6] = bad
        got = call(net, given, cache, mask, form)
        assert np.isnan(np.asarray(got.logits[0, 6])).all()
        np.testing.assert_array_equal(got.logits[0, :6], want.logits[0, :6])
        np.testing.assert_array_equal(got.logits[1, 4:], want.logits[1, 4:])


def test_generation_names_the_prompts_whose_logits_are_nan_and_no_other():
    net = with_poison(model("glm52-hisa"), 3, np.nan)
    prompt, options = [43, 42, 41, 40, 22, 21, 20, 8, 6, 5, 11, 9, 7], dict(max_new_tokens=5, chunk=8)
    with pytest.raises(FloatingPointError, match=r"prompts\[0\](?!.*prompts\[1\])"):
        models.generate(net, [[4, 3, *range(4, 15)], prompt], **options)
