"""A layer's results against NumPy in float32, for a few queries of the first and the last sequence."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hisa_jax as hj
from bench.gpu.checks import scores_of
from bench.layer.choice import WrongError, check_best, check_best_of_blocks
from bench.layer.parts import Layer, Result
from hisa_jax.models.cache import contiguous, plain_latents
from hisa_jax.models.rope import rotate

# Relative norms: bfloat16 roundings of four products in a row; index queries and keys in e4m3.
OUTPUT, LATENT, LATENT_8_BITS, SCORES = 3e-2, 1e-2, 4e-2, 0.1
# Of a scan: the share of XLA's tokens that it chooses; else the mean score below theirs, of the spread of scores.
AGREES, WORSE = 0.97, 1e-2
_SAMPLES = 512


def check(layer: Layer, result: Result, method: hj.Method) -> None:
    """Raises WrongError unless output, latents, index scores and selection are right."""
    for b in sorted({0, layer.setting.B - 1}):
        sequence = _Sequence.of(layer, result.pages, b)
        for t in sorted({0, layer.setting.T - 1}):
            indices = np.asarray(result.selection.indices[b, t])
            output, latent = _reference(layer, sequence.latents, indices, b, t)
            _demand_near("the output", result.out[b, t], output, OUTPUT)
            tolerance = LATENT if layer.setting.config.latent_dtype is None else LATENT_8_BITS
            _demand_near("the latent", sequence.latents[int(layer.inputs.slots[b, t])], latent, tolerance)
            _check_scores(layer, sequence, b, t)
            _check_selection(layer, result.selection, sequence, method, (b, t))


class _Sequence(NamedTuple):
    """What the pages hold of one, in order, on the host: [S, D], [S], [S, Dk] float32."""

    keys: np.ndarray
    scales: np.ndarray
    latents: np.ndarray

    @classmethod
    def of(cls, layer: Layer, pages: hj.IndexCache, b: int) -> "_Sequence":
        assert pages.scales is not None and pages.latents is not None  # keys of 8 bits have scales
        tables, lengths = layer.inputs.block_tables[b : b + 1], layer.inputs.lengths[b : b + 1]
        latents = plain_latents(pages, tables, lengths, jnp.float32)[0]
        keys, scales = (contiguous(x, tables, lengths)[0] for x in (pages.keys, pages.scales))
        return cls(*(np.asarray(x).astype(np.float32) for x in (keys, scales, latents)))


def _demand_near(what: str, got: Any, wanted: np.ndarray, tolerance: float) -> None:
    error = np.linalg.norm(np.asarray(got, np.float32) - wanted) / np.linalg.norm(wanted)
    if not error < tolerance:
        raise WrongError(f"{what} is {error:.2g} off NumPy's, wanted less than {tolerance}")


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


def _check_scores(layer: Layer, sequence: _Sequence, b: int, t: int) -> None:
    """Index scores of some tokens by quantised queries, against those by plain ones."""
    k, scales = sequence.keys[-_SAMPLES:], sequence.scales[-_SAMPLES:]
    got = scores_of(layer.q[b, t], k, scales, layer.w[b, t])
    q, w = layer.plain_queries(b, t)
    _demand_near("an index score", got, scores_of(q, k, scales, w), SCORES)


def _check_selection(
    layer: Layer, selection: hj.Selection, sequence: _Sequence, method: hj.Method, at: tuple[int, int]
) -> None:
    """The best tokens by NumPy's scores; a scan's are XLA's, or others as good where it scores more of them."""
    slot, count = int(layer.inputs.slots[at]), int(selection.count[at])
    chosen = np.asarray(selection.indices[at])
    own = chosen[:count]
    is_list = count == min(method.topk, slot + 1) and (chosen[count:] == -1).all() and (np.diff(own) > 0).all()
    if not is_list or own[0] < 0 or own[-1] > slot:
        raise WrongError(f"query {at} has a list that is none")
    q, w = layer.q[at], layer.w[at]
    seen = sequence._replace(keys=sequence.keys[: slot + 1], scales=sequence.scales[: slot + 1])
    scores = scores_of(q, seen.keys, seen.scales, w)
    if isinstance(method, hj.Hisa):
        block_scores = scores_of(q, _means(seen, method.block_size), None, w)
        check_best_of_blocks(own, scores, block_scores, method.block_size, method.block_topk, at)
    elif isinstance(method, hj.Scan):
        wanted = _by_xla(layer, seen, method, at)
        agrees = len(np.intersect1d(own, wanted)) / len(wanted)
        worse = (scores[wanted].mean() - scores[own].mean()) / scores.std()
        if agrees < AGREES and worse >= WORSE:
            raise WrongError(f"query {at} chooses {agrees:.3g} of the tokens that it should, wanted {AGREES} at least")
    else:
        check_best(own, scores, at)


def _means(seen: _Sequence, size: int) -> np.ndarray:
    values = seen.keys * seen.scales[:, None]
    return np.stack([values[first : first + size].mean(axis=0) for first in range(0, len(values), size)])


def _by_xla(layer: Layer, seen: _Sequence, method: hj.Scan, at: tuple[int, int]) -> np.ndarray:
    keys = hj.QuantizedKeys(jnp.asarray(seen.keys, layer.pages.keys.dtype)[None], jnp.asarray(seen.scales)[None])
    q, w = layer.q[at][None, None], layer.w[at][None, None]
    plain = dataclasses.replace(method, sketch=None)
    found = np.asarray(hj.select(q, keys, w, plain, implementation="xla").indices[0, 0])
    return found[found >= 0]
