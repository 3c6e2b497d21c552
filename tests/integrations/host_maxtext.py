"""MaxText's indexer and MLA layer, from the installed package, with ours in place of theirs."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import maxtext
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from maxtext.configs import pyconfig
from maxtext.layers import attention_mla, embeddings
from maxtext.utils import maxtext_utils
from maxtext.utils.model_creation_utils import from_config

import hisa_jax as hj
from hisa_jax.integrations.maxtext import indexer_class, install
from tests.integrations.installed import run_example

jax.config.update("jax_num_cpu_devices", 2)
FILE = pathlib.Path(maxtext.__path__[0]) / "configs" / "base.yml"
SIZES = dict(
    base_emb_dim=32, base_num_query_heads=4, base_num_kv_heads=4, q_lora_rank=24, kv_lora_rank=16, v_head_dim=16,
    qk_nope_head_dim=16, qk_rope_head_dim=8, indexer_n_heads=4, indexer_head_dim=16,
)  # fmt: skip
B, T, K = 2, 64, 8
FLAT, HISA = hj.Dsa(topk=K), hj.Hisa(topk=K, block_size=4, block_topk=4)
OTHERS = [HISA, hj.Scan(topk=K, candidates=K, exact_heads=1), hj.BlockSparse(topk=K, block_size=4)]


@pytest.fixture(autouse=True)
def theirs_again():
    yield
    install(None)


@functools.cache
def config(**changes):
    """The smallest that still has every part, in float32."""
    exact = dict(dtype="float32", matmul_precision="highest", float32_qk_product=True, float32_logits=True)
    lengths = dict(max_target_length=T, max_prefill_predict_length=48, max_position_embeddings=1024)
    rope = dict(rope_type="yarn", rope_factor=40, original_max_position_embeddings=64)
    run = dict(run_name="test", enable_checkpointing=False, per_device_batch_size=1, attention="dot_product")
    parts = dict(attention_type="mla", use_indexer=True, indexer_topk=K, mla_naive_kvcache=False)
    return pyconfig.initialize([None, str(FILE)], **(SIZES | exact | lengths | rope | run | parts | changes))


def mesh_of(settings):
    return Mesh(maxtext_utils.create_device_mesh(settings), settings.mesh_axes)


def indexer(method=None, **changes):
    settings = config(**changes)
    rope = embeddings.YarnRotaryEmbedding(
        max_position_embeddings=1024, mesh=mesh_of(settings), original_max_position_embeddings=64, rope_theta=10000,
        rope_factor=40, embedding_dims=8, fprop_dtype=settings.dtype, interleave=False, truncate=True, rngs=nnx.Rngs(0),
        beta_fast=32, beta_slow=1, attention_scaling=False,
    )  # fmt: skip
    made = attention_mla.Indexer if method is None else indexer_class(method)
    return made(config=settings, rotary_embedding=rope, rngs=nnx.Rngs(params=0))


def mla(method, mode="train", **changes):
    """A layer as a model makes it, after the one line that switches."""
    install(method)
    settings = config(**changes)
    same = (
        "num_query_heads", "num_kv_heads", "head_dim", "dtype", "weight_dtype", "float32_qk_product", "float32_logits",
        "attention_type", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "mscale",
        "max_position_embeddings", "original_max_position_embeddings", "rope_factor", "max_target_length",
        "max_prefill_predict_length",
    )  # fmt: skip
    shape = (B, T, SIZES["base_emb_dim"])
    return attention_mla.MLA(
        config=settings, mesh=mesh_of(settings), attention_kernel="dot_product", inputs_q_shape=shape,
        inputs_kv_shape=shape, rngs=nnx.Rngs(params=0), model_mode=mode,
        **{name: getattr(settings, name) for name in same},
    )  # fmt: skip


def inputs(seed=0):
    """Hidden states and query latents; a row of three sequences and padding, a row of one; positions of each token."""
    x, latent = (jax.random.normal(jax.random.key(seed + i), (B, T, n)) for i, n in enumerate((32, 24)))
    segments = jnp.array([[1] * 21 + [2] * 30 + [3] * 9 + [0] * 4, [1] * T])
    first = jnp.array([[0] * 21 + [21] * 30 + [51] * 9 + [60] * 4, [0] * T])
    return x, latent, segments, jnp.arange(T)[None] - first


def mask_of(segments):
    is_seen = (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((T, T), bool))
    return jnp.where(is_seen, 0.0, attention_mla.DEFAULT_MASK_VALUE)


def is_chosen(mask):
    return np.asarray(mask == 0)


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("has_mask", [True, False])
def test_by_the_flat_method_mask_indices_and_scores_are_theirs(has_mask, chunk):
    x, latent, segments, positions = inputs()
    mask = mask_of(segments) if has_mask else None
    options = dict(mla_qk_head_chunk_size=chunk)
    want, _, scores = indexer(**options)(x, latent, x, positions, mask)
    got, indices, ours = jax.jit(indexer(FLAT, **options).__call__)(x, latent, x, positions, mask)
    np.testing.assert_array_equal(is_chosen(got), is_chosen(want))
    np.testing.assert_allclose(np.maximum(ours, -1e30), np.maximum(scores, -1e30), atol=2e-6)
    rows = [np.flatnonzero(row) for row in is_chosen(got).reshape(-1, T)]
    for row, listed in zip(rows, np.asarray(indices).reshape(-1, K), strict=True):
        np.testing.assert_array_equal(np.pad(row, (0, K - len(row)), constant_values=-1), listed)


def test_in_bfloat16_few_tokens_differ_from_theirs():
    x, latent, segments, positions = inputs()
    x, latent, mask = x.astype(jnp.bfloat16), latent.astype(jnp.bfloat16), mask_of(segments)
    want, got = (is_chosen(indexer(m, dtype="bfloat16")(x, latent, x, positions, mask)[0]) for m in (None, FLAT))
    assert (want & got).sum() / want.sum() > 0.98


@pytest.mark.parametrize("method", OTHERS)
def test_a_sequence_chooses_alike_packed_and_alone(method):
    """The second of the three in its row begins in the middle of a block."""
    x, latent, segments, positions = inputs()
    own = slice(21, 51)
    got = is_chosen(indexer(method)(x, latent, x, positions, mask_of(segments))[0])[0, own]
    length = own.stop - own.start
    alone = [jnp.pad(a[:1, own], ((0, 0), (0, T - length), (0, 0))) for a in (x, latent)]
    sees = mask_of(jnp.where(jnp.arange(T) < length, 1, 0)[None])
    want = is_chosen(indexer(method)(*alone, alone[0], jnp.arange(T)[None], sees)[0])[0, :length, :length]
    np.testing.assert_array_equal(got[:, own], want)
    assert not np.delete(got, np.arange(T)[own], axis=1).any()
    flat = is_chosen(indexer(FLAT)(x, latent, x, positions, mask_of(segments))[0])[0, own]
    assert (got != flat).any()  # else nothing was tested


@pytest.mark.parametrize("is_sparse", [True, False])
def test_by_the_flat_method_outputs_losses_and_gradients_of_a_layer_are_theirs(is_sparse):
    x, _, segments, positions = inputs()
    options = dict(indexer_loss_scaling_factor=0.1, indexer_sparse_training=is_sparse)

    def run(layer, x):
        out, _ = layer(x, x, positions, segments, model_mode="train")
        return jnp.sum(out**2) + layer.indexer_loss.get_value(), out

    run = nnx.jit(nnx.value_and_grad(run, has_aux=True))
    (want, out), gradients = run(mla(None, **options), x)
    (got, ours), ours_gradients = run(mla(FLAT, **options), x)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(ours, out, atol=1e-6)
    theirs, ours = (jax.tree.leaves_with_path(nnx.to_pure_dict(g)) for g in (gradients, ours_gradients))
    assert [path for path, _ in theirs] == [path for path, _ in ours]
    assert any(np.any(leaf) for path, leaf in ours if "indexer" in jax.tree_util.keystr(path))
    for (path, a), (_, b) in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * max(1.0, np.abs(a).max()), err_msg=str(path))


def test_an_indexer_learns_from_the_loss_over_what_hisa_chose():
    x, _, segments, positions = inputs()
    layer = mla(HISA, indexer_loss_scaling_factor=1.0, indexer_sparse_training=True)
    graph, weights, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    @jax.value_and_grad
    def loss(weights):
        layer = nnx.merge(graph, weights, rest)
        layer(x, x, positions, segments, model_mode="train")
        return layer.indexer_loss.get_value()

    losses = []
    for _ in range(8):
        value, gradient = loss(weights)
        losses.append(float(value))
        weights = jax.tree.map(lambda w, g: w - 0.3 * g, weights, gradient)
    assert losses[-1] < 0.9 * losses[0], losses


def serve(method):
    """Outputs of prompts of 40 and 25 tokens, in a prefill of 48, and of six tokens decoded after each."""
    layer, x, lengths = mla(method, "prefill"), inputs()[0], np.array([[40], [25]])
    segments = jnp.asarray(np.arange(48) < lengths, jnp.int32)
    prompt, _ = layer(x[:, :48], x[:, :48], jnp.arange(48)[None].repeat(B, 0), segments, model_mode="prefill")
    outs = [np.where(segments[..., None] > 0, prompt, 0)]
    for i in range(6):
        new, positions = x[:, 48 + i : 49 + i], jnp.asarray(lengths + i)
        outs.append(np.asarray(layer(new, new, positions, None, model_mode="autoregressive")[0]))
    return np.concatenate(outs, axis=1)


def test_by_the_flat_method_prefill_and_decoding_are_theirs():
    np.testing.assert_allclose(serve(FLAT), serve(None), atol=1e-6)


@pytest.mark.parametrize("method", OTHERS)
def test_decoding_chooses_as_a_forward_pass_of_the_whole_sequence_does(method):
    """The cache has a gap between a prompt that does not fill the prefill and the tokens after it."""
    served, x = serve(method), inputs()[0]
    for row, length in enumerate((40, 25)):
        whole = jnp.concatenate([x[row, :length], x[row, 48:54]])[None].repeat(B, 0)
        whole = jnp.pad(whole, ((0, 0), (0, T - length - 6), (0, 0)))
        ones, positions = jnp.ones((B, T), jnp.int32), jnp.arange(T)[None].repeat(B, 0)
        want = np.asarray(mla(method)(whole, whole, positions, ones, model_mode="train")[0])[0]
        np.testing.assert_allclose(served[row, :length], want[:length], atol=2e-5)
        np.testing.assert_allclose(served[row, 48:], want[length : length + 6], atol=2e-5)


@pytest.mark.parametrize("method", [FLAT, HISA])
def test_devices_choose_for_their_rows_alone(method):
    x, latent, segments, positions = inputs()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    settings = indexer(method)
    split = indexer_class(method, mesh=mesh, batch_axes=("data",))
    there = split(config=settings.config, rotary_embedding=settings.rotary_embedding, rngs=nnx.Rngs(params=0))
    call = jax.jit(there.__call__)
    arguments = x, latent, x, positions, mask_of(segments)
    np.testing.assert_array_equal(call(*arguments)[1], settings(*arguments)[1])
    text = call.lower(*arguments).as_text()
    assert "shard_map" in text or "manual" in text


def test_a_whole_model_computes_by_the_flat_method_what_it_does_by_theirs():
    """DeepSeek-V3.2 as MaxText names it, made small: a dense layer and one of experts."""
    experts = dict(num_experts=4, num_experts_per_tok=2, base_moe_mlp_dim=32, base_mlp_dim=32, sparse_matmul=False)
    model = dict(model_name="deepseek3.2-671b", override_model_config=True, vocab_size=128, weight_dtype="float32")
    settings = config(**experts, **model, base_num_decoder_layers=2, first_num_dense_layers=1)
    tokens = jax.random.randint(jax.random.key(0), (1, T), 0, 128)

    def logits(method):
        install(method)
        model = from_config(settings, rngs=nnx.Rngs(params=0, dropout=0))
        return nnx.jit(lambda model: model(tokens, jnp.arange(T)[None], enable_dropout=False))(model)

    theirs = logits(None)
    np.testing.assert_allclose(logits(FLAT), theirs, atol=1e-5)
    assert np.abs(logits(HISA) - theirs).max() > 0.01


def test_the_example_of_the_documentation_runs():
    run_example("maxtext")


def test_where_everything_fits_the_attention_keeps_its_mask():
    x, latent, segments, positions = inputs()
    mask = mask_of(segments)
    got, indices, scores = indexer(hj.Dsa(topk=T), indexer_topk=T)(x, latent, x, positions, mask)
    assert got is mask and scores is mask and indices is None


def test_one_line_switches_and_one_line_switches_back():
    theirs = attention_mla.Indexer
    install(HISA)
    assert issubclass(attention_mla.Indexer, theirs) and attention_mla.Indexer is indexer_class(HISA)
    install(FLAT)
    assert attention_mla.Indexer is indexer_class(FLAT)
    install(None)
    assert attention_mla.Indexer is theirs


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (hj.Dsa(topk=16), {}, r"indexer_topk=8, wanted 16, the topk of Dsa\(topk=16\)"),
        (FLAT, {"indexer_use_approx_top_k": True}, "indexer_use_approx_top_k=True, wanted False"),
        (
            FLAT,
            {"ici_context_parallelism": 2},
            "context_parallel_load_balance=True, wanted False: tokens must be",
        ),
    ],
)
def test_settings_that_a_method_cannot_keep_are_refused(method, changes, message):
    with pytest.raises(ValueError, match=message):
        indexer(method, **changes)


def test_what_cannot_be_installed_is_refused():
    with pytest.raises(TypeError, match=r"integrations.maxtext: method is 'hisa', wanted a Hisa"):
        install("hisa")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    for options in (dict(mesh=mesh), dict(batch_axes=("data",)), dict(mesh=mesh, batch_axes=("fsdp",))):
        with pytest.raises(ValueError, match=r"integrations.maxtext: batch_axes=.*, wanted axes of the mesh"):
            install(FLAT, **options)
