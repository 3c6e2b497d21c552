"""A layer's results against NumPy in float32, for a few queries of the first and the last sequence."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hisa_jax as hj
from bench.gpu.checks import checked_rows, scores_of
from bench.layer.parts import Layer, Result
from hisa_jax.models.rope import rotate

# Relative norms: bfloat16 roundings of four products in a row; index queries and keys in e4m3.
OUTPUT, LATENT, SCORES = 3e-2, 1e-2, 0.1
AGREES, WORSE = 0.97, 1e-2  # share of the tokens chosen by XLA; mean score below its, of the spread of scores
_SAMPLES = 512


class WrongError(AssertionError):
    """A result that is not what NumPy or XLA find."""


def check(layer: Layer, result: Result, method: hj.Method) -> None:
    """Raises WrongError unless output, latents, index scores and selection are right."""
    for b, t in checked_rows(layer.setting.B, layer.setting.T):
        latents = _sequence(result.pages.latents, layer, b)
        indices = np.asarray(result.selection.indices[b, t])
        output, latent = _reference(layer, latents, indices, b, t)
        _demand_near("the output", result.out[b, t], output, OUTPUT)
        _demand_near("the latent", latents[int(layer.inputs.slots[b, t])], latent, LATENT)
        _check_scores(layer, result.pages, b, t)
        _check_selection(layer, result, method, b, t)


def _demand_near(what: str, got: Any, wanted: np.ndarray, tolerance: float) -> None:
    error = np.linalg.norm(np.asarray(got, np.float32) - wanted) / np.linalg.norm(wanted)
    if not error < tolerance:
        raise WrongError(f"{what} is {error:.2g} off NumPy's, wanted less than {tolerance}")


def _sequence(pages: Any, layer: Layer, b: int) -> np.ndarray:
    """[n_pages, page_size, ...] -> [S, ...] float32 of one sequence."""
    found = pages[layer.inputs.block_tables[b]]
    return np.asarray(found.reshape(-1, *found.shape[2:]), np.float32)


def _reference(layer: Layer, latents: np.ndarray, indices: np.ndarray, b: int, t: int) -> tuple[np.ndarray, np.ndarray]:
    """The layer's output for one token, given what it selects, and the token's own latent."""
    config, weights = layer.setting.config, layer.weights
    P, L = config.qk_nope_head_dim, config.kv_lora_rank
    x = np.asarray(layer.inputs.x[b, t], np.float32)
    cos_sin = jax.tree.map(lambda part: part[b : b + 1, t : t + 1], layer.inputs.table)
    turn = lambda part: np.asarray(rotate(jnp.asarray(part)[None, None], cos_sin, config.rope_interleave))[0, 0]  # noqa: E731
    q_latent = _rms_norm(x @ weights["q_a"], weights["q_a_norm"], config.lora_norm_eps)
    q = np.einsum("l,lnd->nd", q_latent, weights["q_b"])
    kv = x @ weights["kv_a"]
    latent = np.concatenate([_rms_norm(kv[:L], weights["kv_a_norm"], config.lora_norm_eps), turn(kv[L:])])
    seen = latents[indices[indices >= 0]]
    logits = np.einsum("nd,lnd->nl", q[:, :P], weights["k_b"]) @ seen[:, :L].T + turn(q[:, P:]) @ seen[:, L:].T
    p = np.exp(config.softmax_scale * (logits - logits.max(axis=1, keepdims=True)))
    values = np.einsum("nl,lnv->nv", p / p.sum(axis=1, keepdims=True) @ seen[:, :L], weights["v_b"])
    return np.einsum("nv,nve->e", values, weights["o"]), latent


def _rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x) + eps) * scale


def _check_scores(layer: Layer, pages: hj.IndexCache, b: int, t: int) -> None:
    """Index scores of some tokens by quantised queries, against those by plain ones."""
    k, scales = _sequence(pages.keys, layer, b)[-_SAMPLES:], _sequence(pages.scales, layer, b)[-_SAMPLES:]
    got = scores_of(layer.q[b, t], k, scales, layer.w[b, t])
    q, w = layer.plain_queries(b, t)
    _demand_near("an index score", got, scores_of(q, k, scales, w), SCORES)


def _check_selection(layer: Layer, result: Result, method: hj.Method, b: int, t: int) -> None:
    """The tokens that XLA chooses; a scan may choose others that are as good, where it scores more of them."""
    slot, pages = int(layer.inputs.slots[b, t]), result.pages
    chosen, count = np.asarray(result.selection.indices[b, t]), int(result.selection.count[b, t])
    own = chosen[:count]
    k = min(method.topk, slot + 1) if not isinstance(method, hj.BlockSparse) else count
    if count != k or (chosen[count:] != -1).any() or (np.diff(own) <= 0).any() or own[0] < 0 or own[-1] > slot:
        raise WrongError(f"query {t} of sequence {b} has a list that is none")
    assert pages.scales is not None  # keys of 8 bits have them
    pieces = (x[layer.inputs.block_tables[b]] for x in (pages.keys, pages.scales))
    keys = hj.QuantizedKeys(*(x.reshape(1, -1, *x.shape[2:]) for x in pieces))
    q, w = layer.q[b : b + 1, t : t + 1], layer.w[b : b + 1, t : t + 1]
    plain = dataclasses.replace(method, sketch=None) if isinstance(method, hj.Scan) else method
    position = jnp.full((1, 1), slot, jnp.int32)
    wanted = np.asarray(hj.select(q, keys, w, plain, query_positions=position, implementation="xla").indices[0, 0])
    wanted = wanted[wanted >= 0]
    agrees = len(np.intersect1d(own, wanted)) / len(wanted)
    scores = scores_of(q[0, 0], keys.values[0], keys.scales[0], w[0, 0])[: slot + 1]
    worse = (scores[wanted].mean() - scores[own].mean()) / scores.std()
    if agrees < AGREES and not (isinstance(method, hj.Scan) and worse < WORSE):
        raise WrongError(f"query {t} of sequence {b} chooses {agrees:.3g} of XLA's tokens, wanted {AGREES} at least")
